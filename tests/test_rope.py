"""rope.py against complex numbers: rotating a pair by an angle is multiplying by e^(i·angle)."""

import torch

from kandinsky5.rope import (
    apply_rope,
    apply_rope_half_split,
    build_angles,
    build_angles_3d,
    build_rotations,
    scale_for_size,
)


def test_interleaved_pairs_are_rotated_like_complex_numbers():
    x, angles = torch.randn(2, 3, 5, 8), torch.randn(5, 4) * 10
    expected = torch.view_as_complex(x.reshape(2, 3, 5, 4, 2)) * torch.exp(1j * angles)
    torch.testing.assert_close(apply_rope(x, build_rotations(angles)), torch.view_as_real(expected).flatten(-2))


def test_half_split_pairs_are_rotated_like_complex_numbers():
    x, angles = torch.randn(2, 3, 5, 8), torch.randn(5, 4) * 10
    expected = torch.complex(x[..., :4], x[..., 4:]) * torch.exp(1j * angles)
    torch.testing.assert_close(apply_rope_half_split(x, angles), torch.cat([expected.real, expected.imag], dim=-1))


def test_a_token_has_the_angles_of_its_three_positions():
    axes, scale = (4, 6, 8), (1.0, 2.0, 3.16)
    angles = build_angles_3d((3, 4, 5), axes, scale, torch.device("cpu"))
    t, h, w = 2, 3, 1
    expected = [
        position * 10000 ** (-2 * i / axis) / factor
        for position, axis, factor in zip((t, h, w), axes, scale, strict=True)
        for i in range(axis // 2)
    ]
    torch.testing.assert_close(angles[t, h, w], torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_products_depend_on_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 16).double()
    angles = build_angles(torch.arange(50), 16).double()
    near = [
        (apply_rope_half_split(q, angles[i : i + 1]) * apply_rope_half_split(k, angles[i + 7 : i + 8])).sum()
        for i in (0, 11, 42)
    ]
    torch.testing.assert_close(near[0], near[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(near[0], near[2], rtol=1e-4, atol=1e-4)


def test_angles_stay_float32_for_half_precision_input():
    x = torch.randn(1, 1, 3, 4, dtype=torch.bfloat16)
    angles = build_angles(torch.tensor([0, 500, 1000]), 4)
    assert angles.dtype == torch.float32
    assert apply_rope(x, build_rotations(angles)).dtype == torch.bfloat16


def test_scale_for_size_is_that_of_diffusers():
    assert scale_for_size(512, 768) == scale_for_size(480, 854) == (1.0, 2.0, 2.0)
    assert scale_for_size(768, 1280) == scale_for_size(1024, 1024) == scale_for_size(512, 864) == (1.0, 3.16, 3.16)
