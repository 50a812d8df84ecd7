"""CLIP-MoE as LLaVA-1.5's vision tower: what upstream calls on a tower, and nothing else (docs/design.md).

Upstream's counterpart is llava/model/multimodal_encoder/clip_encoder.py (CLIPVisionTower). Ours differs in three
ways: it stays frozen and in eval mode whatever a trainer calls (unless `--mm_tune_vision_tower` asks for more), it
holds only the blocks that `select_layer` needs (-2: all but the last), and it reads our directories.

Shape suffixes:  B images   R side in pixels   N patches (R/patch)^2   T = N + 1 tokens   C channels
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPImageProcessor

from .configuration_clipmoe import CLIPMoEVisionConfig
from .files import load_tensors
from .model_directory import local_directory, read_config
from .modeling_clipmoe import CLIPMoEVisionModel
from .tower_registry import Tower, UnknownTower, resolve
from .tower_tuning import MARK, Tuning, balance_loss, changed_tensors, check_tuning, load_tuned, require_gradients


def build_tower(tower: Tower, args: Any, **kwargs: Any) -> CLIPMoEVisionTower:
    """The tower that a name stands for; `args` is LLaVA's config or its model arguments."""
    s2 = tower.s2 or getattr(args, "s2", False)
    return (CLIPMoEVisionTowerS2 if s2 else CLIPMoEVisionTower)(tower.name, args, **kwargs)


class CLIPMoEVisionTower(nn.Module):
    """CLIP-MoE, frozen unless asked to learn: pixels [B,3,R,R] -> features [B,N,C] (`select_feature` "patch") in the
    pixels' dtype.

    vision_tower: a registered name, or a directory or hub id of ours.
    args: has `mm_vision_select_layer` (an index into hidden states: -2 is the output of the last block but one) and
    perhaps `mm_vision_select_feature` ("patch", or "cls_patch" for [B,N+1,C]).
    delay_load: read only the config now; `load_model()` reads the weights.
    Raises UnknownTower for a name that is not ours, ValueError for a layer that does not exist.
    """

    def __init__(self, vision_tower: str, args: Any, delay_load: bool = False):
        super().__init__()
        self.is_loaded = False
        self.vision_tower_name = vision_tower
        tower = resolve(vision_tower)
        if tower is None:
            raise UnknownTower(f"{vision_tower!r} is upstream LLaVA's own tower, not a CLIP-MoE.")
        self.source = tower
        self.directory = local_directory(tower.source)
        self.select_layer = args.mm_vision_select_layer
        self.select_feature = getattr(args, "mm_vision_select_feature", "patch")
        if self.select_feature not in ("patch", "cls_patch"):
            raise ValueError(f"mm_vision_select_feature must be 'patch' or 'cls_patch', got {self.select_feature!r}.")
        self.cfg_only = read_config(self.directory).vision_config
        self.num_blocks = _blocks_needed(self.cfg_only, self.select_layer)
        self.tuning: Tuning | None = None
        """What stage 2 trains of it now; None: it is frozen."""
        self.tuned: list[str] = []
        """Names of the tensors that are, or will be, other than the directory's."""
        self.tuned_in = getattr(args, MARK, None) and getattr(args, "_name_or_path", None)
        """The LLaVA that holds them: a directory or hub id."""
        self.balance: list[torch.Tensor] = []
        if not delay_load:
            self.load_model()

    # ------------------------------------------------------------------------------------------------------- loading

    def load_model(self, device_map: Any = None) -> None:
        """Read the weights, once. device_map: as in `from_pretrained` (None: stay on the CPU, in the stored dtype).

        On a GPU the tower is loaded in float16, LLaVA's inference dtype; the router computes in float32 all the same.
        """
        if self.is_loaded:
            return
        self.image_processor = self._image_processor()
        changed = load_tuned(self.tuned_in, self.num_blocks) if self.tuned_in else {}
        model = _load_blocks(self.directory, self.cfg_only, self.num_blocks, changed)
        self.tuned = sorted(changed)
        self.vision_tower = _place(model, device_map).requires_grad_(False).eval()
        self.is_loaded = True

    def _image_processor(self) -> CLIPImageProcessor:
        return CLIPImageProcessor.from_pretrained(self.directory)

    def train(self, mode: bool = True) -> CLIPMoEVisionTower:
        """Stays in eval mode: LLaVA's trainer calls `.train()` on the whole model (and, in eval mode, gradient
        checkpointing is out of the way too). Of a tower that learns the encoder alone takes the mode: so its blocks
        may be checkpointed and no packed copies of its weights are used, but nothing is dropped at random."""
        super().train(False)
        if self.tuning is not None:
            self.vision_tower.vision_model.encoder.training = mode
        return self

    def to(self, *args: Any, **kwargs: Any) -> CLIPMoEVisionTower:
        """As `nn.Module.to`, but float16 on the CPU becomes float32: upstream asks for float16 everywhere, and the
        CPU has no fast (in older torch versions: no) float16 convolution. The weights are never rounded on the way."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)  # as Module.to does
        place = device or (self.device if self.is_loaded else torch.device("cpu"))
        if dtype == torch.float16 and place.type == "cpu":
            dtype = torch.float32
        return super().to(device=device, dtype=dtype, non_blocking=non_blocking)

    # ------------------------------------------------------------------------------------------------------ learning

    def ask_for_tuning(self, tuning: Tuning) -> None:
        """Note what is to be trained; `wake` begins with it. Raises ValueError for what this tower has not."""
        check_tuning(tuning, self.config, self.vision_tower_name)
        self.tuning = tuning

    def wake(self, half: bool, engine: bool = False) -> None:
        """Begin to learn what `tuning` says.

        half: products run in half precision; otherwise the whole tower goes to fp32. What is trained is in fp32 all the
        same, as peft keeps adapters: in bf16 most small steps would round to nothing. Not under DeepSpeed (engine),
        which keeps fp32 copies of its own, and whose ZeRO-3 wants one dtype for all.
        """
        if not half:
            self.vision_tower.float()
        dtype = self.dtype if engine else torch.float32
        self.tuned = sorted({*self.tuned, *require_gradients(self.vision_tower, self.tuning, dtype)})

    def changed(self) -> dict[str, torch.Tensor]:
        """What differs from the directory's tower, by name; every process must call it."""
        return changed_tensors(self.vision_tower, self.tuned)

    def take_balance(self) -> torch.Tensor | None:
        """The weighted router losses of the last pass, once; None where no routers are trained."""
        balance, self.balance = self.balance, []
        return torch.stack(balance).mean() if balance else None

    # ------------------------------------------------------------------------------------------------------- forward

    def forward(self, images: torch.Tensor | list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        """[B,3,R,R] -> [B,N,C]; a list of [3,R,R] -> a list of [1,N,C], as upstream."""
        self.balance = []
        with torch.set_grad_enabled(self.tuning is not None and torch.is_grad_enabled()):
            if isinstance(images, list):
                return [self._features(image.unsqueeze(0)).to(image.dtype) for image in images]
            return self._features(images).to(images.dtype)

    def _features(self, pixels_B3RR: torch.Tensor) -> torch.Tensor:
        """-> [B,N,C] (or [B,N+1,C]) in the tower's dtype. The last block that is loaded gives the asked layer."""
        pixels_B3RR = pixels_B3RR.to(device=self.device, dtype=self.dtype)
        balanced = torch.is_grad_enabled() and self.tuning is not None and self.tuning.what == "routers"
        out = self.vision_tower(pixels_B3RR, output_router_logits=balanced)
        if balanced:
            self.balance.append(balance_loss(out.router_logits, pixels_B3RR, self.config))
        x_BTC = out.last_hidden_state
        return x_BTC[:, 1:] if self.select_feature == "patch" else x_BTC

    # ---------------------------------------------------------------------------------------- what LLaVA asks it for

    @property
    def dummy_feature(self) -> torch.Tensor:
        """[1,C] of zeros, for a batch without pictures."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_tower.dtype

    @property
    def device(self) -> torch.device:
        return self.vision_tower.device

    @property
    def config(self) -> CLIPMoEVisionConfig:
        """The whole tower's configuration (all its blocks), known before the weights are loaded."""
        return self.cfg_only

    @property
    def hidden_size(self) -> int:
        """Channels C of a feature."""
        return self.config.hidden_size

    @property
    def num_patches_per_side(self) -> int:
        return self.config.image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        """Features N of one picture."""
        return self.num_patches_per_side**2


class CLIPMoEVisionTowerS2(CLIPMoEVisionTower):
    """The same on several scales (S2, Shi et al. 2024, "When Do We Not Need Larger Vision Models?").

    A picture enters at the largest scale; at each scale it is resized and cut into tiles of the model's own size, the
    tiles' features are laid side by side again, averaged down to the smallest scale's grid, and the scales are
    concatenated: [B,3,S,S] -> [B,N, C * scales]. Answers to upstream's CLIPVisionTowerS2, without the package
    `s2wrapper`.
    """

    def __init__(self, vision_tower: str, args: Any, delay_load: bool = False):
        super().__init__(vision_tower, args, delay_load=True)
        asked = getattr(args, "s2_scales", None) or self.source.s2_scales
        if isinstance(asked, str):  # upstream's form: "336,672,1008"
            asked = [int(part) for part in asked.split(",")]
        self.scales = sorted(asked) or [n * self.config.image_size for n in (1, 2, 3)]
        self.tile = self.config.image_size
        if self.scales[0] != self.tile or any(scale % self.tile for scale in self.scales):
            raise ValueError(
                f"s2_scales {self.scales} do not fit a tower of {self.tile} px: the first must be {self.tile} and the "
                "others multiples of it."
            )
        if self.select_feature != "patch":
            raise ValueError("S2 joins patches; mm_vision_select_feature must be 'patch'.")
        if not delay_load:
            self.load_model()

    def _image_processor(self) -> CLIPImageProcessor:
        largest = self.scales[-1]
        size = {"size": {"shortest_edge": largest}, "crop_size": {"height": largest, "width": largest}}
        return CLIPImageProcessor.from_pretrained(self.directory, **size)

    def _features(self, pixels_B3SS: torch.Tensor) -> torch.Tensor:
        pixels_B3SS = pixels_B3SS.to(device=self.device, dtype=self.dtype)
        per_scale = [self._at_scale(pixels_B3SS, scale) for scale in self.scales]
        return torch.cat(per_scale, dim=1).flatten(2).transpose(1, 2)

    def _at_scale(self, pixels_B3SS: torch.Tensor, scale: int) -> torch.Tensor:
        """-> feature map [B,C,n,n] with n patches a side, whatever the scale."""
        if pixels_B3SS.shape[-1] != scale:
            resized = F.interpolate(pixels_B3SS.float(), size=(scale, scale), mode="bicubic").to(pixels_B3SS.dtype)
        else:
            resized = pixels_B3SS
        batch, tiles, side = len(resized), scale // self.tile, self.num_patches_per_side
        x_B3tRtR = resized.unflatten(3, (tiles, self.tile)).unflatten(2, (tiles, self.tile))
        tiles_M3RR = x_B3tRtR.permute(0, 2, 4, 1, 3, 5).reshape(batch * tiles**2, -1, self.tile, self.tile)
        x_MNC = super()._features(tiles_M3RR)
        x_BttnnC = x_MNC.unflatten(1, (side, side)).unflatten(0, (batch, tiles, tiles))
        x_BCss = x_BttnnC.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, tiles * side, tiles * side)
        return F.adaptive_avg_pool2d(x_BCss.float(), side).to(x_BCss.dtype)

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size * len(self.scales)


# -------------------------------------------------------------------------------------------------------------- weights


def _blocks_needed(config: CLIPMoEVisionConfig, select_layer: int) -> int:
    """Blocks to run for `hidden_states[select_layer]`: there is one hidden state more than blocks, the input first."""
    states = config.num_hidden_layers + 1
    if not -states <= select_layer < states:
        raise ValueError(
            f"mm_vision_select_layer {select_layer} does not exist: this tower has {states} hidden states "
            f"({-states} to {states - 1}). LLaVA-1.5 uses -2."
        )
    return select_layer % states


def _load_blocks(
    directory: Path, config: CLIPMoEVisionConfig, blocks: int, changed: dict[str, torch.Tensor]
) -> CLIPMoEVisionModel:
    """The vision model with only its first `blocks` blocks, in the stored dtype. Other tensors are not even read.

    changed: tensors of a tower that a LLaVA trained on, in the place of the directory's."""
    short = copy.deepcopy(config)
    short.num_hidden_layers = blocks
    short.moe_layers = [layer for layer in config.moe_layers if layer < blocks]
    short.delta_ranks = config.delta_ranks and config.delta_ranks[: len(short.moe_layers)]
    with torch.device("meta"):  # no time or memory for random weights that are replaced at once
        model = CLIPMoEVisionModel(short)
    expected = model.state_dict()
    state = load_tensors(directory, keep=expected.__contains__)
    wrong = [name for name in expected if name not in state or state[name].shape != expected[name].shape]
    if wrong:
        raise ValueError(
            f"the weights in {directory} do not fit its config ({len(wrong)} tensors missing or of another shape: "
            f"{', '.join(wrong[:5])}). The directory is incomplete or damaged: copy or download it again."
        )
    for name, tensor in changed.items():
        if name not in state or state[name].shape != tensor.shape:
            raise ValueError(
                f"{directory} is another tower than the one that this LLaVA trained on: {name} has no place in it. "
                "Register the one that it was trained with."
            )
        state[name] = tensor.to(state[name].dtype)
    model.load_state_dict(state, assign=True)
    return model


def _place(model: CLIPMoEVisionModel, device_map: Any) -> CLIPMoEVisionModel:
    """Put the model where `device_map` says: None, a device, a dictionary, or "auto" and its kin (accelerate)."""
    if device_map is None:
        return model
    single = _single_device(device_map)
    if single is not None:
        return model.to(single, dtype=torch.float16 if single.type != "cpu" else None)
    from accelerate import dispatch_model, infer_auto_device_map

    model = model.half()
    if not isinstance(device_map, dict):
        device_map = infer_auto_device_map(model, no_split_module_classes=model._no_split_modules)
    return dispatch_model(model, device_map)


def _single_device(device_map: Any) -> torch.device | None:
    """The one device that `device_map` means, or None where it means several."""
    if isinstance(device_map, dict):
        places = set(device_map.values())
        return _device(places.pop()) if len(places) == 1 else None
    if not isinstance(device_map, str) or device_map not in ("auto", "balanced", "balanced_low_0", "sequential"):
        return _device(device_map)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.device_count() == 1 else None


def _device(place: Any) -> torch.device:
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
