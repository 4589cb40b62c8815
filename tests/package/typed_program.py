"""A user's program. mypy checks it in test_types.py, and finds the errors that the comments name, and no other."""

import torch

import fastclip

model = torch.nn.Linear(80, 64)
x = torch.randn(8, 80)

fastclip.SGD(model.parameters(), lr=0.1, max_norm=1.0).step()
fastclip.SGD(model.named_parameters(), 0.1, 0.9, clip_value=(-0.01, 0.02), momentum_dtype=torch.bfloat16)
fastclip.SGD([{"params": model.parameters(), "clip_value": 0.1}], lr=torch.tensor(0.1), norm_type=float("inf"))
fastclip.Adam(model.parameters(), betas=(0.9, 0.98), skip_nonfinite=True, amsgrad=True)
fastclip.SGD(model.parameters(), lr=0.1, max_nrom=1.0)  # error: call-arg
fastclip.Adam(model.parameters(), momentum=0.9)  # error: call-arg
fastclip.AdamW(model.parameters(), clip_norm=0.9)  # error: call-arg
fastclip.SGD(model.parameters(), max_norm=fastclip.QuantileNorm(0.75, scale=2), skip_norm={"rule": "ema", "z": 6})
fastclip.SGD(model.parameters(), max_norm="ema", skip_norm=None)
fastclip.SGD(model.parameters(), max_norm=(1.0, 2.0))  # error: arg-type
fastclip.QuantileNorm(0.5, z=3.0)  # error: call-arg
fastclip.SGD(model, max_norm=1)  # error: arg-type
fastclip.SGD(model.parameters(), clip_value=(1.0,))  # error: arg-type

optimizer = fastclip.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, max_norm=1.0, master_weights=True)
torch_optimizer: torch.optim.AdamW = optimizer
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
fastclip.AdamW.step(optimizer)
optimizer.zero_grad(set_to_none=True)
optimizer.load_state_dict(optimizer.state_dict())
print(optimizer.totl_norm)  # error: attr-defined

norm: torch.Tensor = fastclip.clip_grad_norm_(model.parameters(), 5.0, norm_type=2)
fastclip.clip_grad_value_(model.weight, (-0.1, 0.1))
fastclip.clip_grad_value_(model, 0.1)  # error: arg-type
fastclip.clip_grad_value_(model.parameters(), "0.1")  # error: arg-type
fastclip.clip_grad_norm_(model.parameters())  # error: call-arg
fastclip.clip_grad_norm_(model.parameters(), (1.0, 2.0))  # error: arg-type

with fastclip.step_in_backward(model, optimizer, bucket_cap_mb=8) as in_backward, in_backward.accumulate():
    model(x).sum().backward()
in_backward.remove()
fastclip.step_in_backward(optimizer, model)  # error: arg-type arg-type
fastclip.step_in_backward(model, optimizer, 8)  # error: call-arg


def log(stats: fastclip.ClipStats) -> float:
    norm = stats.total_norm
    stats.total_norm.item()  # error: union-attr
    print(stats.norm)  # error: attr-defined
    return 0.0 if norm is None else norm.item()


cuda: str | None = fastclip.build_info()["cuda"]
