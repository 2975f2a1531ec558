"""Hunyuan-DiT's config, for what follows from the sizes of the whole model."""

HUNYUAN_DIT = {
    "_class_name": "HunyuanDiT2DModel",
    "attention_head_dim": 88,
    "hidden_size": 1408,
    "in_channels": 4,
    "mlp_ratio": 4.3637,
    "num_attention_heads": 16,
    "num_layers": 40,
    "patch_size": 2,
    "sample_size": 128,
    "use_style_cond_and_image_meta_size": False,
}
