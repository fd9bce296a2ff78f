"""The Dual-SVID start is what its formulas say."""

from __future__ import annotations

import torch

from usllm.littlebit.dual_svid import dual_svid, rank_one, truncated_svd


def test_start_is_the_truncated_singular_value_decomposition_with_rank_one_magnitudes() -> None:
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(1))
    for matrix in (weight, weight.T.contiguous()):
        left, right = truncated_svd(matrix, 9)
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        torch.testing.assert_close(left @ right.T, (u[:, :9] * s[:9]) @ vh[:9], rtol=0, atol=1e-5)
        torch.testing.assert_close(left.norm(dim=0), right.norm(dim=0), rtol=1e-4, atol=0)
        a, b = rank_one(left.abs())
        u, s, vh = torch.linalg.svd(left.abs())
        torch.testing.assert_close(torch.outer(a, b), s[0] * torch.outer(u[:, 0], vh[0]), rtol=0, atol=1e-4)
        path = dual_svid(matrix, 9)
        assert torch.equal(torch.signbit(path.u), torch.signbit(left))
        torch.testing.assert_close(path.u.square().mean().sqrt(), matrix.square().mean().sqrt())
