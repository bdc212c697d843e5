"""Models of `transformers` with random weights and random statistics, small: two blocks, images of 32 to 64 pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["ARCHITECTURES", "built", "randomized"]

_IMAGE = (2, 3, 32, 32)
_TEXT = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_WIDE = {**_TEXT, "intermediate_size": 48}
_LLAMA = {**_WIDE, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
_SPEECH = {
    **_WIDE,
    "conv_dim": (16, 16),
    "conv_kernel": (5, 3),
    "conv_stride": (3, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
_VIT = {**{k: v for k, v in _WIDE.items() if k != "vocab_size"}, "image_size": 32, "patch_size": 8}
_STAGES = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 1]}

# Name -> (class of the model, options of its configuration, shape of an image or a sound, or the length of a text).
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "resnet": ("ResNetModel", _STAGES, _IMAGE),
    "resnet basic": ("ResNetForImageClassification", {**_STAGES, "layer_type": "basic", "num_labels": 5}, _IMAGE),
    "regnet": ("RegNetModel", {**_STAGES, "groups_width": 4, "layer_type": "y"}, _IMAGE),
    "mobilenet v1": ("MobileNetV1Model", {"depth_multiplier": 0.25}, _IMAGE),
    "mobilenet v2": ("MobileNetV2Model", {"depth_multiplier": 0.25}, _IMAGE),
    "efficientnet": (
        "EfficientNetModel",
        {
            "image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320,
        },
        _IMAGE,
    ),
    "bit": ("BitModel", {**_STAGES, "num_groups": 4}, _IMAGE),
    "convnext": ("ConvNextModel", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}, _IMAGE),
    "convnext v2": ("ConvNextV2Model", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}, _IMAGE),
    "levit": (
        "LevitForImageClassification",
        {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1],
         "key_dim": [4, 4, 4], "num_labels": 5},
        (2, 3, 64, 64),
    ),
    "vit": ("ViTForImageClassification", _VIT, _IMAGE),
    "deit": ("DeiTModel", _VIT, _IMAGE),
    "beit": ("BeitModel", _VIT, _IMAGE),
    "dinov2": ("Dinov2Model", {**_VIT, "hidden_size": 32}, _IMAGE),
    "swin": ("SwinModel", {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 2],
                           "window_size": 4}, _IMAGE),
    "swin v2": ("Swinv2Model", {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 1],
                                "num_heads": [2, 2], "window_size": 4}, _IMAGE),
    "segformer": (
        "SegformerForSemanticSegmentation",
        {"num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [8, 16], "num_attention_heads": [1, 2],
         "decoder_hidden_size": 16, "sr_ratios": [2, 1], "patch_sizes": [3, 3], "strides": [4, 2],
         "mlp_ratios": [2, 2], "num_labels": 4},
        _IMAGE,
    ),
    "poolformer": (
        "PoolFormerModel",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_encoder_blocks": 2, "patch_sizes": [3, 3], "strides": [2, 2],
         "padding": [1, 1]},
        _IMAGE,
    ),
    "cvt": (
        "CvtModel",
        {"embed_dim": [16, 32], "num_heads": [1, 2], "depth": [1, 2], "patch_sizes": [7, 3], "patch_stride": [4, 2],
         "patch_padding": [2, 1], "stride_kv": [2, 2], "stride_q": [1, 1], "kernel_qkv": [3, 3], "padding_kv": [1, 1],
         "padding_q": [1, 1], "mlp_ratio": [2.0, 2.0], "attention_drop_rate": [0.0, 0.0], "drop_rate": [0.0, 0.0],
         "drop_path_rate": [0.0, 0.0], "qkv_bias": [True, True], "cls_token": [False, True],
         "qkv_projection_method": ["dw_bn", "dw_bn"]},
        _IMAGE,
    ),
    "mobilevit": (
        "MobileViTModel",
        {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 12, 16, 16, 24, 32], "num_attention_heads": 2,
         "image_size": 64},
        (2, 3, 64, 64),
    ),
    "mobilevit v2": ("MobileViTV2Model", {"width_multiplier": 0.25, "image_size": 64}, (2, 3, 64, 64)),
    "pvt": (
        "PvtModel",
        {"image_size": 32, "num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [8, 16], "patch_sizes": [4, 2],
         "strides": [4, 2], "sequence_reduction_ratios": [2, 1], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]},
        _IMAGE,
    ),
    "pvt v2": ("PvtV2Model", {"image_size": 32, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1],
                              "num_attention_heads": [1, 1, 2, 2]}, _IMAGE),
    "focalnet": ("FocalNetModel", {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1],
                                   "focal_levels": [1, 1], "focal_windows": [3, 3], "hidden_sizes": [16, 32]}, _IMAGE),
    "swiftformer": ("SwiftFormerModel", {"image_size": 64, "depths": [1, 1, 1, 1], "embed_dims": [8, 16, 16, 24]},
                    (2, 3, 64, 64)),
    "hgnet v2": (
        "HGNetV2ForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "stem_channels": [3, 8, 8],
         "stage_in_channels": [8, 16], "stage_mid_channels": [8, 8], "stage_out_channels": [16, 16],
         "stage_num_blocks": [1, 1], "stage_downsample": [False, True], "stage_light_block": [False, True],
         "stage_kernel_size": [3, 5], "stage_numb_of_layers": [2, 2], "num_labels": 5},
        _IMAGE,
    ),
    "rt-detr backbone": ("RTDetrResNetBackbone", {**_STAGES, "layer_type": "basic"}, _IMAGE),
    "detr": (
        "DetrForObjectDetection",
        {"backbone_config": {"model_type": "resnet", **_STAGES, "out_features": ["stage2"]}, "d_model": 16,
         "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 3,
         "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_labels": 3},
        _IMAGE,
    ),
    "upernet": (
        "UperNetForSemanticSegmentation",
        {"backbone_config": {"model_type": "convnext", "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1],
                             "out_features": ["stage1", "stage2", "stage3", "stage4"]},
         "hidden_size": 16, "auxiliary_in_channels": 16, "auxiliary_channels": 8, "num_labels": 3},
        (2, 3, 64, 64),
    ),
    "dpt": (
        "DPTForSemanticSegmentation",
        {**_VIT, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 8, 16, 16],
         "fusion_hidden_size": 8, "use_batch_norm_in_fusion_residual": True, "num_labels": 3},
        _IMAGE,
    ),
    "mobilevit, segmentation": (
        "MobileViTForSemanticSegmentation",
        {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 12, 16, 16, 24, 32], "num_attention_heads": 2,
         "image_size": 64, "aspp_out_channels": 16, "num_labels": 3},
        (2, 3, 64, 64),
    ),
    "vitpose": (
        "VitPoseForPoseEstimation",
        {"backbone_config": {"model_type": "vitpose_backbone", "image_size": [32, 32], "patch_size": [8, 8],
                             "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                             "intermediate_size": 48, "out_indices": [2]},
         "use_simple_decoder": False, "num_labels": 3},
        _IMAGE,
    ),
    "patchtst": (
        "PatchTSTModel",
        {"num_input_channels": 3, "context_length": 32, "patch_length": 4, "patch_stride": 4, "d_model": 16,
         "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 16},
        (2, 32, 3),
    ),
    "patchtsmixer": (
        "PatchTSMixerModel",
        {"num_input_channels": 3, "context_length": 32, "patch_length": 4, "patch_stride": 4, "d_model": 16,
         "num_layers": 2, "norm_mlp": "BatchNorm"},
        (2, 32, 3),
    ),
    "wav2vec2 conformer": ("Wav2Vec2ConformerModel", {**_SPEECH, "conv_depthwise_kernel_size": 3}, (2, 400)),
    "textnet": ("TextNetModel", {}, _IMAGE),
    "vision transformer, masked": ("ViTMAEModel", {**_VIT, "mask_ratio": 0.0}, _IMAGE),
    "bert": ("BertForMaskedLM", _WIDE, 7),
    "roberta": ("RobertaModel", {**_WIDE, "pad_token_id": 0}, 7),
    "roberta, norm first": ("RobertaPreLayerNormModel", {**_WIDE, "pad_token_id": 0}, 7),
    "albert": ("AlbertModel", {**_WIDE, "embedding_size": 16}, 7),
    "electra": ("ElectraModel", {**_WIDE, "embedding_size": 16}, 7),
    "distilbert": ("DistilBertModel", {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}, 7),
    "deberta v2": ("DebertaV2Model", {**_WIDE, "relative_attention": True}, 7),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4}, 7),
    "gpt neox": ("GPTNeoXForCausalLM", _WIDE, 7),
    "opt": ("OPTForCausalLM", {**_TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32}, 7),
    "bloom": ("BloomForCausalLM", {"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 4}, 7),
    "llama": ("LlamaForCausalLM", _LLAMA, 7),
    "mistral": ("MistralForCausalLM", _LLAMA, 7),
    "qwen3": ("Qwen3ForCausalLM", _LLAMA, 7),
    "gemma": ("GemmaForCausalLM", _LLAMA, 7),
    "gemma2": ("Gemma2ForCausalLM", _LLAMA, 7),
    "phi": ("PhiForCausalLM", {**_WIDE, "num_key_value_heads": 4}, 7),
    "falcon": ("FalconForCausalLM", {**_TEXT}, 7),
    "mixtral": ("MixtralForCausalLM", {**_LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1}, 7),
    "mamba": ("MambaForCausalLM", {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, 7),
    "t5": ("T5EncoderModel", {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
           7),
    "wav2vec2": ("Wav2Vec2Model", _SPEECH, (2, 400)),
    "wav2vec2, layer norm": (
        "Wav2Vec2Model", {**_SPEECH, "feat_extract_norm": "layer", "do_stable_layer_norm": True}, (2, 400)
    ),
    "hubert": ("HubertModel", {**_SPEECH, "conv_pos_batch_norm": True}, (2, 400)),
    "whisper": (
        "WhisperForAudioClassification",
        {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "num_mel_bins": 8,
         "max_source_positions": 20, "num_labels": 5, "classifier_proj_size": 16},
        (2, 8, 40),
    ),
    "audio spectrogram transformer": ("ASTModel", {**_WIDE, "max_length": 40, "num_mel_bins": 16}, (2, 40, 16)),
}  # fmt: skip


def built(name: str) -> tuple[nn.Module, Any]:
    """A model in evaluation mode with random weights and statistics, and inputs for it."""
    import transformers

    kind, options, size = ARCHITECTURES[name]
    model_class = getattr(transformers, kind)
    torch.manual_seed(0)
    model = randomized(model_class(model_class.config_class(**options)))
    if isinstance(size, int):
        return model, {"input_ids": torch.randint(2, 40, (2, size))}
    return model, torch.randn(size)


def randomized(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, its norms as if trained: gamma of both signs and a 0, any mean."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if "Norm" not in type(module).__name__:
                continue
            for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if not value.is_floating_point() or value.dim() != 1:
                    continue
                if "var" in name:
                    value.uniform_(0.5, 2.0, generator=generator)
                else:
                    value.normal_(generator=generator)
                if name == "weight":
                    value[0] = 0.0
    return model.eval()
