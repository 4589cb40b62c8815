"""A tensor whose memory was freed: the step is refused. Each test runs in a Python of its own, as torch would crash."""

import pytest

from tests.support.scripts import run_script

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("freed", ["p", "p.grad", "opt.state[p]['momentum_buffer']"])
def test_freed_memory_is_refused(freed):
    """As FSDP frees parameters. torch's own SGD dies of it, too."""
    result = run_script(f"""if True:
        import torch, fastclip
        first, p = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
        opt = fastclip.SGD([("first", first), ("p", p)], lr=1.0, momentum=0.9)
        for _ in range(2):
            first.grad, p.grad = torch.ones(4), torch.ones(4)
            if opt.state:
                {freed}.untyped_storage().resize_(0)
            try:
                opt.step()
            except (RuntimeError, ValueError) as error:
                print("parameter 1 of group 0 ('p')" in str(error), first.tolist())
    """)
    assert result.stdout == "True [-1.0, -1.0, -1.0, -1.0]\n", (result.returncode, result.stderr)


@pytest.mark.parametrize("freed", ["p", "p.grad"])
def test_freed_memory_is_refused_where_a_state_takes_the_step_to_plain_torch(freed):
    result = run_script(f"""if True:
        import torch, fastclip
        p = torch.zeros(4, 4, requires_grad=True)
        opt = fastclip.SGD([("p", p)], lr=1.0, momentum=0.9)
        p.grad = torch.ones(4, 4)
        opt.step()
        opt.state[p]["momentum_buffer"] = torch.ones(4, 4).t()
        {freed}.untyped_storage().resize_(0)
        try:
            opt.step()
        except RuntimeError as error:
            print("parameter 0 of group 0 ('p') has no memory" in str(error))
    """)
    assert result.stdout == "True\n", (result.returncode, result.stderr)
