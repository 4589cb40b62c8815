"""Several threads and processes."""

import threading

from .cases import CLIPS, assert_close, give_grads, pair, step_both
from .scripts import run_script


def test_two_optimizers_in_two_threads():
    """The GIL is released for large steps."""

    def work(seed, results):
        loop, theirs, optimizer, ours = pair([(600, 700), (5,)], CLIPS["value and norm"], momentum=0.9)
        for _ in range(5):
            give_grads(theirs, ours)
            step_both(loop, theirs, optimizer, ours)
        results[seed] = (theirs, ours)

    results = {}
    threads = [threading.Thread(target=work, args=(seed, results)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for theirs, ours in results.values():
        assert_close(theirs, ours, 2e-6)
    assert len(results) == 2


def test_a_forked_child_can_step():
    """As with stock torch: after set_num_threads(1), since OpenMP's threads do not survive a fork."""
    result = run_script("""if True:
        import os, torch, fastclip
        p = torch.zeros(300_000, requires_grad=True)
        opt = fastclip.SGD([p], lr=1.0, momentum=0.9, max_norm=1e9)
        torch.set_num_threads(2)
        p.grad = torch.ones_like(p)
        opt.step()
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            opt.step()
            os._exit(0 if torch.allclose(p.detach(), torch.tensor(-2.9)) else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """)
    assert result.stdout == "0\n", result.stderr
