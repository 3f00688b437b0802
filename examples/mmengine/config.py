# python examples/mmengine/train.py examples/mmengine/config.py
custom_imports = dict(imports=["fused_dino.integrations.mmengine", "model"])
model = dict(
    type="TextToImage",
    text_dim=8,
    latent_dim=64,
    dino=dict(
        type="DinoSupervision",
        in_dim=64,
        hidden_dim=32,
        img_size=28,
        warmup_steps=10,
        teacher=dict(type="DINOv2Backbone", variant="vits14", img_size=28, pretrained=False),  # random weights
        loss_type=dict(type="CosineLoss"),
    ),
)
train_dataloader = dict(
    batch_size=4,
    dataset=dict(type="RandomPairs", count=16, text_dim=8),
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
)
optim_wrapper = dict(optimizer=dict(type="AdamW", lr=0.001))
train_cfg = dict(by_epoch=False, max_iters=4)
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=1), checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=2)
)
randomness = dict(seed=0)
work_dir = "work_dirs/text2image"
