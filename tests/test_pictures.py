"""What a camera showed, on its way from a policy's batch to a video: whole numbers, and a copy of them."""

import pytest

torch = pytest.importorskip("torch")

from lerobot_attn.capture import HostCopies  # noqa: E402
from lerobot_attn.policies.flow import as_uint8  # noqa: E402


def pictures(dtype, *shape):
    images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)) * 1.4 - 0.2
    images.view(-1)[:511] = torch.arange(511) / 510  # all halves between two whole numbers
    return images.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 31, 33), (31, 33, 3), (1, 31, 33)])
def test_pictures_are_rounded_as_pytorch_rounds(dtype, shape):
    images = pictures(dtype, *shape)
    before = images.clone()
    found = as_uint8(images)
    assert found.dtype == torch.uint8
    assert torch.equal(found, (images * 255).round().clamp(0, 255).to(torch.uint8))
    assert torch.equal(images, before)


def test_a_picture_without_numbers_is_no_warning(recwarn):
    images = pictures(torch.float32, 3, 16, 16)
    images[0, 0, 0, 0] = torch.nan
    assert as_uint8(images).shape == images.shape
    assert not recwarn.list


def test_whole_numbers_stay_as_they_are():
    images = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).view(2, 3, 4, 5)
    assert as_uint8(images) is images


def test_what_becomes_a_videos_frame_lies_together_in_memory():
    assert as_uint8(pictures(torch.float32, 3, 31, 33)).permute(0, 2, 3, 1).is_contiguous()


@pytest.mark.parametrize("turned", [False, True])
def test_a_copy_of_a_picture_stays_what_it_was(turned):
    picture = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).view(2, 3, 4, 5)
    source = picture.permute(0, 2, 3, 1) if turned else picture
    copy = HostCopies().copy(source)
    assert copy.is_contiguous()
    assert torch.equal(copy, source)
    expected = source.clone()
    picture.zero_()
    assert torch.equal(copy, expected)
