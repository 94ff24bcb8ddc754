import threading

import torch

from nnssl_ext.views.cpu.chunks import SAMPLES, VOXELS, flat_chunks, sample_chunks, scratch, voxel_chunks

CPU = torch.device("cpu")


def test_pieces_are_all_of_a_volume_in_place() -> None:
    volume = torch.zeros(3, VOXELS // 2)
    for number, piece in enumerate(flat_chunks(volume)):
        assert len(piece) <= VOXELS
        piece.fill_(number + 1)
    assert volume.view(-1)[:VOXELS].eq(1).all()
    assert volume.view(-1)[VOXELS:].eq(2).all()


def test_slabs_are_all_of_a_batch_once() -> None:
    batch = torch.zeros(2, 3, VOXELS)
    for samples, voxels in voxel_chunks(batch):
        assert batch[samples, :, voxels].numel() <= VOXELS
        batch[samples, :, voxels] += 1
    assert batch.eq(1).all()


def test_scratch_is_the_same_memory_again_and_another_threads_is_not() -> None:
    first = scratch((4, 5), CPU)
    assert scratch((2, 3), CPU).data_ptr() == first.data_ptr()
    assert scratch((2, 3), CPU).shape == (2, 3)
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(scratch((4, 5), CPU).data_ptr()))
    thread.start()
    thread.join()
    assert found[0] != first.data_ptr()


def test_samples_together_are_all_of_a_batch_once() -> None:
    for voxels, number in ((SAMPLES // 2, 3), (2 * SAMPLES, 5), (SAMPLES, 5), (1, 1)):
        batch = torch.zeros(1).expand(5, 1, voxels)
        taken = [list(range(5))[samples] for samples in sample_chunks(batch)]
        assert [n for part in taken for n in part] == list(range(5))
        assert len(taken) == number
    assert sample_chunks(torch.empty(5, 1, 2 * SAMPLES, device="meta")) == [slice(0, 5)]
