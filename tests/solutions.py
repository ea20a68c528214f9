"""One answer to each exercise of exercises.py; test_readme.py runs its test on it."""

import sslvit  # before torch
import torch
import torch.nn.functional as F


def info_nce(q, k, temperature):
    return sslvit.contrastive_loss(q, k, temperature) / (2 * temperature)


def looked_at_keys(attn):
    return torch.special.entr(attn).sum(dim=-1).exp()


def low_pass(images, cutoff):
    height, width = images.shape[-2:]
    y = torch.fft.fftfreq(height)[:, None] * 2 * torch.pi
    x = torch.fft.fftfreq(width) * 2 * torch.pi
    is_slow = torch.hypot(*torch.broadcast_tensors(y, x)) <= cutoff
    return torch.fft.ifft2(torch.fft.fft2(images) * is_slow).real


def cka(x, y):
    x = x - x.mean(dim=0)
    y = y - y.mean(dim=0)
    return (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())


def gradient_cosine(loss_a, loss_b, parameters):
    def flat(loss):
        how = {"materialize_grads": True, "retain_graph": True}
        gradients = torch.autograd.grad(loss, parameters, **how)
        return torch.cat([gradient.flatten() for gradient in gradients])

    return F.cosine_similarity(flat(loss_a), flat(loss_b), dim=0)


SOLUTIONS = (info_nce, looked_at_keys, low_pass, cka, gradient_cosine)
