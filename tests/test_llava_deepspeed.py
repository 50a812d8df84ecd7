"""DeepSpeed's engine with our vision tower, for real: ZeRO-2 and ZeRO-3 in two CPU processes.

What could break is ZeRO-3: it gathers a module's weights from all processes when the module is called, so a process
that skipped an expert would leave the others waiting for ever. The two processes here see pictures that are routed
differently. Skipped where DeepSpeed is not installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, make_tiny_config, shake
from torch import nn

from llava_clipmoe.modeling_clipmoe import CLIPMoEModel, CLIPMoEVisionModel

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed (pip install deepspeed)"
)

STAGES = (2, 3)
STEPS = 3
PROCESSES = 2
LR = 1e-2  # of SGD with momentum: Adam would blow rounding errors of tiny gradients up to whole steps


class TowerAndProjector(nn.Module):
    """LLaVA's stage 1 in small: a frozen CLIP-MoE, read at its last hidden state but one, and a trained projector."""

    def __init__(self):
        super().__init__()
        config = make_tiny_config(num_experts=4, num_experts_per_tok=2)
        tower = CLIPMoEVisionModel(config.vision_config)
        tower.load_state_dict(shake(CLIPMoEModel(config), seed=1).state_dict(), strict=False)
        self.tower = tower.requires_grad_(False).eval()
        self.mm_projector = nn.Sequential(nn.Linear(48, 32), nn.GELU(), nn.Linear(32, 16))
        shake(self.mm_projector, seed=2)

    def forward(self, pixels: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """-> loss, and how many tokens chose each expert of the first block."""
        with torch.no_grad():
            out = self.tower(pixels, output_hidden_states=True, output_router_logits=True)
        chosen = out.router_logits[0].topk(2, -1).indices.flatten().bincount(minlength=4).tolist()
        return (self.mm_projector(out.hidden_states[-2]) - target).square().mean(), chosen


def batch_of(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two pictures and their targets; every step and process has its own."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(2, 3, 24, 24, generator=generator) + rank, torch.randn(2, 10, 16, generator=generator)


def train_plainly() -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    """The same training without DeepSpeed: gradients averaged over the processes' batches."""
    model = TowerAndProjector()
    optimizer = torch.optim.SGD(model.mm_projector.parameters(), lr=LR, momentum=0.9)
    losses = []
    for step in range(STEPS):
        of_ranks = [model(*batch_of(step, rank))[0] for rank in range(PROCESSES)]
        optimizer.zero_grad()
        (sum(of_ranks) / PROCESSES).backward()
        optimizer.step()
        losses.append([loss.item() for loss in of_ranks])
    return losses, model.mm_projector.state_dict()


def train_with_the_engine(config_file: str, folder: Path) -> None:
    """One process of the DeepSpeed run; the first one saves the projector."""
    import deepspeed

    rank = int(os.environ["RANK"])
    model = TowerAndProjector()
    config = json.loads(Path(config_file).read_text())
    config = {key: value for key, value in config.items() if value != "auto" and key not in ("bf16", "fp16")}
    zero = config["zero_optimization"]
    zero.update({key: 100_000 for key, value in zero.items() if value == "auto"})
    if zero["stage"] == 3:
        zero["stage3_param_persistence_threshold"] = 0  # every tensor is sharded, however small
    config["train_micro_batch_size_per_gpu"] = 2
    config["gradient_clipping"] = 0.0  # DeepSpeed 0.19 clips at 1.0 unless it is told
    config["zero_allow_untested_optimizer"] = True
    optimizer = torch.optim.SGD(model.mm_projector.parameters(), lr=LR, momentum=0.9)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    log = {"stage": engine.zero_optimization_stage(), "losses": [], "chosen": []}
    for step in range(STEPS):
        loss, chosen = engine(*batch_of(step, rank))
        engine.backward(loss)
        engine.step()
        log["losses"].append(loss.item())
        log["chosen"].append(chosen)
    experts = model.tower.vision_model.encoder.layers[0].mlp.experts.fc1.weight
    log["expert_numbers_held"] = experts.numel()  # 0 while ZeRO-3 has the weights sharded
    projector = dict(model.mm_projector.named_parameters())
    with deepspeed.zero.GatheredParameters(list(projector.values()), enabled=zero["stage"] == 3):
        if rank == 0:
            torch.save({name: tensor.detach().clone() for name, tensor in projector.items()}, folder / "projector.pt")
    (folder / f"rank{rank}.json").write_text(json.dumps(log))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_both_engines_train_as_plain_torch_does(tmp_path):
    """ZeRO-2 and then ZeRO-3 in the same two processes."""
    port = str(free_port())
    processes = []
    for rank in range(PROCESSES):
        environment = {
            **os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port, "WORLD_SIZE": str(PROCESSES), "RANK": str(rank), "LOCAL_RANK": str(rank),
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]),
        }  # fmt: skip
        with open(tmp_path / f"rank{rank}.log", "wb") as log:
            command = [sys.executable, __file__, str(tmp_path)]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=300) for process in processes]  # a deadlock ends here
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * PROCESSES, "\n".join((tmp_path / f"rank{r}.log").read_text()[-2000:] for r in range(2))

    losses, projector = train_plainly()
    start = TowerAndProjector().mm_projector.state_dict()
    for stage in STAGES:
        folder = tmp_path / f"stage{stage}"
        logs = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(PROCESSES)]
        assert [log["stage"] for log in logs] == [stage] * PROCESSES
        assert [log["expert_numbers_held"] > 0 for log in logs] == [stage == 2] * PROCESSES
        assert logs[0]["chosen"] != logs[1]["chosen"], "both processes routed alike: the test shows nothing"
        torch.testing.assert_close(torch.tensor([log["losses"] for log in logs]).T, torch.tensor(losses))
        saved = torch.load(folder / "projector.pt", weights_only=True)
        assert saved.keys() == projector.keys()
        for name, tensor in saved.items():
            torch.testing.assert_close(tensor, projector[name])
            assert not torch.equal(tensor, start[name]), f"{name} was not trained"


def main(folder: Path) -> None:
    """One of the processes."""
    import deepspeed

    # An optional all-reduce in shared memory that DeepSpeed would compile with the C++ compiler for a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")
    for stage in STAGES:
        own = folder / f"stage{stage}"
        own.mkdir(exist_ok=True)
        train_with_the_engine(str(REPOSITORY / "train_llava" / f"zero{stage}.json"), own)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
