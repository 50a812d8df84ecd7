"""`--engine.chunk-size auto`: the search against simulated cards, the trials on real models, and whole runs.

Memory is measured here as it is on a GPU, by counters of an allocator: the CPU's, which torch's profiler reads. The
CUDA counters themselves are tested where there is a GPU.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from measured_memory import GIB, CPUAllocator

from llava_clipmoe.files import read_json
from llava_clipmoe.upcycling import is_ffn, moe_config, upcycle
from train_encoder.config import EngineConfig, OptimConfig
from train_encoder.training import chunks, loop
from train_encoder.training.chunks import Card, ChunkError, choose_chunk, even, largest_chunk, ran_out_of_memory
from train_encoder.training.losses import make_objective

hypothesis = pytest.importorskip("hypothesis", reason="needs the `dev` extra")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402


class SimulatedCard:
    """Memory of `base + image * chunk` bytes, each time off by up to `noise`; runs out at `capacity`."""

    name, total = "simulated", 80 * GIB

    def __init__(self, base: float, image: float, limit: float, capacity: float = math.inf, noise=lambda: 0.0):
        self.base, self.image, self.most, self.capacity, self.noise = base, image, limit, capacity, noise
        self.tried: list[tuple[int, int | None]] = []

    def limit(self) -> int:
        return int(self.most)

    def trial(self, chunk: int) -> int | None:
        peak = int((self.base + self.image * chunk) * (1 + self.noise()))
        self.tried.append((chunk, peak if peak <= self.capacity else None))
        return self.tried[-1][1]


def even_sizes(share: int) -> set[int]:
    return {even(share, most) for most in range(1, share + 1)}


# ---------------------------------------------------------------------------------------------------- the search


@pytest.mark.parametrize(
    ("share", "most", "chunk"), [(800, 96, 89), (800, 10, 10), (100, 100, 100), (100, 99, 50), (7, 3, 3), (1, 1, 1)]
)
def test_a_batch_is_cut_into_the_fewest_pieces_of_nearly_one_size(share, most, chunk):
    assert even(share, most) == chunk
    assert math.ceil(share / chunk) == math.ceil(share / most)


@given(st.integers(1, 2000), st.floats(0, 60 * GIB), st.floats(1e6, 3 * GIB))
def test_on_an_affine_card_the_largest_even_chunk_is_found_in_a_few_trials(share, base, image):
    card = SimulatedCard(base, image, 72 * GIB)
    fitting = [size for size in even_sizes(share) if int(base + image * size) <= card.most]
    chunk, peak = largest_chunk(share, card.limit, card.trial)
    assert chunk == max(fitting, default=1)
    assert (chunk, peak) in card.tried and len(card.tried) <= 6


@settings(max_examples=300)
@given(
    st.integers(1, 2000),
    st.floats(1 * GIB, 30 * GIB),
    st.floats(0.05 * GIB, 1.5 * GIB),
    st.floats(0.5, 1.1),
    st.randoms(use_true_random=False),
)
def test_what_is_found_has_run_though_memory_is_noisy_and_runs_out_early(share, base, image, early, random):
    """Holes between tensors: memory ends at any point from half of the limit on."""
    limit = 72 * GIB
    card = SimulatedCard(base, image, limit, early * limit, lambda: random.uniform(-0.01, 0.01))
    chunk, peak = largest_chunk(share, card.limit, card.trial)
    assert (chunk, peak) in card.tried and peak <= limit and len(card.tried) <= chunks.MOST_TRIALS
    possible = (0.97 * min(limit, early * limit) - base) / image
    best = max(size for size in even_sizes(share) if size <= max(possible, 1))
    assert chunk >= best / 2


def test_a_card_that_holds_the_whole_share_trains_in_one_piece():
    card = SimulatedCard(5 * GIB, 0.3 * GIB, 72 * GIB)
    assert largest_chunk(100, card.limit, card.trial)[0] == 100
    assert [chunk for chunk, _ in card.tried] == [8, 15, 100]


def test_a_card_that_gets_fuller_while_it_is_measured_is_asked_again():
    """Libraries take memory of their own when they first run."""
    card = SimulatedCard(5 * GIB, 0.5 * GIB, 72 * GIB)
    card.limit = lambda: int((72 if len(card.tried) < 3 else 40) * GIB)
    chunk, peak = largest_chunk(800, card.limit, card.trial)
    assert peak <= 40 * GIB and chunk == even(800, 70)


def test_one_image_above_the_limit_is_accepted_when_it_runs():
    card = SimulatedCard(70 * GIB, 5 * GIB, 72 * GIB, 79 * GIB)
    assert largest_chunk(100, card.limit, card.trial) == (1, 75 * GIB)


def test_a_card_that_holds_not_even_one_image_is_said_to():
    card = SimulatedCard(70 * GIB, 15 * GIB, 72 * GIB, 79 * GIB)
    with pytest.raises(ChunkError, match="not even one image"):
        largest_chunk(100, card.limit, card.trial)


# -------------------------------------------------------------------------------------------- the choice of a chunk


def choose(given, share: int, folder: Path, card=None) -> int | None:
    trial = (lambda gauge: gauge.trial) if card else None
    return choose_chunk(given, "stage1", share, folder / "stage1.json", Accelerator(cpu=True), card, trial)


def test_a_number_and_none_are_taken_as_given(tmp_path):
    card = SimulatedCard(1, 1, 1)
    assert choose(7, 100, tmp_path, card) == 7 and choose(None, 100, tmp_path, card) is None
    assert not card.tried and not list(tmp_path.iterdir())


def test_without_a_gpu_small_batches_are_one_piece_and_the_papers_is_in_tens(tmp_path, capsys):
    assert choose("auto", 64, tmp_path) is None
    assert choose("auto", 800, tmp_path) == 10
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_what_was_measured_is_said_and_kept(tmp_path, capsys):
    card = SimulatedCard(5 * GIB, 0.5 * GIB, 72 * GIB)
    assert choose("auto", 800, tmp_path, card) == 134
    assert capsys.readouterr().out == "stage1: chunks of 134 images: 72.0 of 80.0 GiB\n"
    kept = read_json(tmp_path / "stage1.json")
    assert kept == {
        "images": 134,
        "share": 800,
        "device": "simulated",
        "peak_memory_bytes": 72 * GIB,
        "total_memory_bytes": 80 * GIB,
    }
    assert chunks.kept_chunks(tmp_path) == {"stage1": kept} and chunks.kept_chunks(tmp_path / "none") == {}
    smaller = SimulatedCard(5 * GIB, 0.5 * GIB, 20 * GIB)
    assert choose("auto", 800, tmp_path, smaller) == 134 and not smaller.tried
    assert "chunks of 134 images, as measured on simulated when this training began" in capsys.readouterr().out


def test_a_model_that_does_not_fit_is_told_what_to_do(tmp_path):
    with pytest.raises(ChunkError) as found:
        choose("auto", 100, tmp_path, SimulatedCard(90 * GIB, 1, 72 * GIB, 79 * GIB))
    for word in ("stage1", "not even one image", "80.0 GiB", "--engine.activation-checkpointing", "dmu-lora"):
        assert word in str(found.value), word
    assert not list(tmp_path.iterdir())


def test_a_chunk_below_one_is_refused():
    with pytest.raises(ValueError, match=r"--engine\.chunk-size is 0; it must be at least 1"):
        EngineConfig(chunk_size=0)


@pytest.mark.parametrize(
    ("chunk", "share", "said"),
    [
        (None, 100, "with all 100 images of a process in one piece"),
        (100, 100, "with all 100 images"),
        (96, 800, "in chunks of 96"),
        (96, 800, "--engine.chunk-size 67, then --engine.chunk-size 48"),
        (1, 800, "cannot be lower"),
    ],
)
def test_running_out_of_memory_names_the_flag_and_what_to_try(chunk, share, said):
    with (
        pytest.raises(ChunkError) as found,
        chunks.out_of_memory_names_the_flag("router", chunk, share, SimulatedCard(1, 1, 1)),
    ):
        torch.empty(2**46, dtype=torch.uint8)
    assert said in str(found.value) and "--engine.chunk-size" in str(found.value)
    assert ran_out_of_memory(found.value.__cause__)


def test_other_errors_pass_as_they_are():
    with (
        pytest.raises(RuntimeError, match="size of tensor") as found,
        chunks.out_of_memory_names_the_flag("router", 1, 1, None),
    ):
        torch.zeros(2) + torch.zeros(3)
    assert not isinstance(found.value, ChunkError)


# ----------------------------------------------------------------------------------------- trials with real models


def router(name: str) -> bool:
    return ".mlp.router." in name


KINDS = {
    "everything": (False, lambda name: True, {}),
    "a stage": (False, is_ffn, {}),
    "checkpointed": (False, is_ffn, {}),
    "routers": (True, router, {}),
    "two captions": (True, router, {"loss": "multi-positive"}),
}
SHARE = 12


class Training:
    """The pieces of `loop.train` that a trial needs, for a tiny model of a kind."""

    def __init__(self, kind: str, dense, stages, accelerator: Accelerator | None = None):
        mixture, trainable, optim = KINDS[kind]
        config = moe_config(dense.config, num_experts=len(stages) + 1, num_experts_per_tok=2)
        model = upcycle(dense, stages, config) if mixture else dense
        model.to(next(dense.parameters()).device)._set_gradient_checkpointing(kind == "checkpointed")

        class Bundle:
            image_mean, image_std = (0.5,) * 3, (0.5,) * 3
            context_length = model.config.text_config.max_position_embeddings

        Bundle.model = self.model = model
        self.stage = loop.Stage(kind, Bundle, None, None, None, trainable, OptimConfig(**optim), seed=3)
        self.trained = loop._set_trainable(model, self.stage)
        self.optimizer = torch.optim.AdamW(list(self.trained.values()), 1e-3)
        self.accelerator = accelerator or Accelerator(cpu=True)
        self.towers = loop.TwoTowers(Bundle).train()

    def trial(self, gauge):
        return loop.step_trials(self.stage, self.towers, self.optimizer, self.accelerator, SHARE, gauge)

    def step(self, chunk: int) -> None:
        """A whole step of the training itself, on a full share of the longest captions."""
        objective = make_objective(self.stage.optim)
        batch = loop._longest_batch(SHARE, self.model.config, self.stage, objective.captions)
        loop.forward_backward(self.towers, batch, objective, self.accelerator, chunk, (3, 0))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


@pytest.fixture(params=KINDS)
def training(request, tiny_dense, stages) -> Training:
    return Training(request.param, tiny_dense, stages)


@pytest.mark.parametrize("kind", ["everything", "two captions"])
def test_the_chunk_that_is_found_is_the_largest_whose_step_fits(kind, tiny_dense, stages):
    training, gauge = Training(kind, tiny_dense, stages), CPUAllocator()
    trial = training.trial(gauge)
    peaks = {size: trial(size) for size in sorted(even_sizes(SHARE))}
    assert peaks[1] < peaks[3] < peaks[6] < peaks[SHARE]
    for wanted in (3, 6, SHARE):
        gauge.most = max(peaks[size] for size in peaks if size <= wanted) * 1.02
        assert largest_chunk(SHARE, gauge.limit, trial)[0] == max(s for s in peaks if peaks[s] <= gauge.most)


@pytest.mark.parametrize("chunk", [5, SHARE])
def test_a_trial_takes_what_a_step_of_the_training_takes(training, chunk):
    trial = training.trial(CPUAllocator())(chunk)
    real = CPUAllocator().peak(lambda: [training.step(chunk) for _ in range(2)])  # the second one meets the moments
    assert real <= 1.05 * trial <= 1.3 * real


def test_a_trial_leaves_no_trace(training):
    before = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    torch.manual_seed(7)
    random = torch.get_rng_state()
    assert training.trial(CPUAllocator())(5) > 0
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in training.model.parameters())
    assert not training.optimizer.state
    after = training.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_trial_has_full_captions_and_room_for_the_moments(tiny_dense, stages):
    training, seen = Training("everything", tiny_dense, stages), set()
    tiny_dense.text_model.register_forward_pre_hook(lambda module, given: seen.add(given[0].shape))
    trial = training.trial(CPUAllocator())
    without = trial(5)
    assert (5, 16) in seen and {length for _, length in seen} == {16}
    training.step(5)
    assert without - trial(5) == pytest.approx(2 * sum(p.nbytes for p in training.trained.values()), rel=0.02)


# ------------------------------------------------------------------------------------------------------------ a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpus_own_counters_find_a_chunk_that_fits_and_leave_nothing_behind(kind, tiny_dense, stages):
    training = Training(kind, tiny_dense.cuda(), stages, Accelerator())
    device = training.accelerator.device
    held = torch.cuda.memory_allocated(device)
    gauge = Card(device)
    assert 0 < gauge.limit() < gauge.total
    trial = training.trial(gauge)
    assert largest_chunk(SHARE, gauge.limit, trial)[0] == SHARE  # a tiny model
    assert trial(1) < trial(3) < trial(6)
    peak = trial(5)
    assert largest_chunk(SHARE, lambda: peak, trial)[0] == 4
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(2):
        training.step(5)
    # cuBLAS keeps workspaces, which are no part of a trial that comes first.
    assert torch.cuda.max_memory_allocated(device) <= 1.1 * peak + 2**25
    training.optimizer.state.clear()
    assert torch.cuda.memory_allocated(device) <= held + 2**26
    torch.cuda.manual_seed(5)
    random = torch.cuda.get_rng_state(device)
    trial(3)
    assert torch.equal(torch.cuda.get_rng_state(device), random)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_that_runs_out_in_a_trial_is_left_empty():
    device = torch.device("cuda", torch.cuda.current_device())
    before = torch.cuda.memory_allocated(device)
    gauge = Card(device)

    def too_much() -> None:
        kept = [torch.empty(2**28, dtype=torch.uint8, device=device)]
        kept.append(torch.empty(gauge.total, dtype=torch.uint8, device=device))

    assert gauge.peak(too_much) is None
    assert torch.cuda.memory_allocated(device) == before
