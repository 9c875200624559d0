"""Cross entropy of processes that have a part of the vocabulary each: the whole vocabulary's losses and gradient."""

import pytest
import torch
import torch.multiprocessing as mp

SIZE = 2
TOKENS, VOCABULARY, WIDTH = 9, 21, 5  # the second part has a row less


def inputs():
    torch.manual_seed(0)
    hidden, weight = torch.randn(TOKENS, WIDTH), torch.randn(VOCABULARY, WIDTH)
    labels = torch.randint(0, VOCABULARY, (TOKENS,))
    return hidden.requires_grad_(), weight, labels, torch.rand(TOKENS)


def one_rank(rank, store, out):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=SIZE)
    from posttrain.ops import linear_cross_entropy

    linear_cross_entropy.LOGIT_ROWS = 4  # several chunks, the last not full
    hidden, weight, labels, upstream = inputs()
    rows = -(-VOCABULARY // SIZE)
    own = weight[rank * rows : (rank + 1) * rows]
    group = torch.distributed.group.WORLD
    losses = linear_cross_entropy.DividedLinearCrossEntropy.apply(hidden, own, labels - rank * rows, group)
    (losses * upstream).sum().backward()
    torch.save([losses.detach(), hidden.grad], out / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes(tmp_path):
    context = mp.get_context("fork")
    processes = []
    for rank in range(SIZE):
        processes.append(context.Process(target=one_rank, args=(rank, tmp_path / "store", tmp_path)))
        processes[-1].start()
    for process in processes:
        process.join(100)
        assert process.exitcode == 0
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(SIZE)]
    hidden, weight, labels, upstream = inputs()
    losses = torch.nn.functional.cross_entropy(hidden @ weight.t(), labels, reduction="none")
    (losses * upstream).sum().backward()
    for own, _ in found:
        torch.testing.assert_close(own, losses.detach())
    torch.testing.assert_close(sum(gradient for _, gradient in found), hidden.grad)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [37, 5000, 40000])
def test_kernels(width):
    """Those of a GPU against what they stand for."""
    if not torch.cuda.is_available() or str(torch.cuda.current_device()) == "cpu":
        pytest.skip("no GPU")
    from posttrain.ops.linear_cross_entropy import log_sum_gradient_, log_sum_parts

    torch.manual_seed(0)
    logits = 5 * torch.randn(300, width).to(torch.bfloat16)
    labels = torch.randint(-width, 2 * width, (300,))
    right = log_sum_parts(logits, labels)
    found = log_sum_parts(logits.cuda(), labels.cuda())
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-4)
    log_sums = right[0] + right[1].log() + 0.5
    on_gpu = logits.cuda()
    log_sum_gradient_(on_gpu, labels.cuda(), log_sums.cuda())
    log_sum_gradient_(logits, labels, log_sums)
    torch.testing.assert_close(on_gpu.cpu().float(), logits.float(), rtol=1e-2, atol=1e-4)
