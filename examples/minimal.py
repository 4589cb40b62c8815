"""The whole of it: python -m examples.minimal"""

import torch

import fastclip

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(80, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
optimizer = fastclip.AdamW(model.parameters(), lr=3e-3, max_norm=1.0)
x, y = torch.randn(512, 80), torch.randint(10, (512,))

for epoch in range(1, 11):
    for batch in torch.randperm(len(x)).split(32):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()  # clips and updates in one pass
    stats = optimizer.clip_stats()
    print(f"epoch {epoch:2}: loss {loss:.3f}, norm {stats.total_norm:.2f}, clipped by {stats.clip_coefficient:.2f}")
