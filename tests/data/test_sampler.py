import itertools
import os
import signal

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from zoo.data.sampler import Draw, GroupedOrder, ResumableLoader, StepSampler, seed_of
from zoo.data.stages import Stage
from zoo.errors import UserError

STAGES = [Stage(3, 8, 16), Stage(5, 4, 24), Stage(None, 2, 32)]


class Numbers(Dataset):
    """Samples that say which draw they are and draw something from their own seed, as real ones do."""

    def __len__(self):
        return 7

    def __getitem__(self, draw):
        noise = torch.rand(1, generator=torch.Generator().manual_seed(seed_of(0, draw.number)))
        return {"draw": torch.tensor(draw), "noise": noise}


def rows(batches):
    return [(tuple(map(tuple, batch["draw"].tolist())), batch["noise"].tolist()) for batch in batches]


def loader(**keywords):
    return ResumableLoader(Numbers(), STAGES, 1, **{"epoch_steps": 4, **keywords})


def take(source, count):
    return list(itertools.islice(source, count))


def test_seeds_depend_on_every_part():
    seeds = [
        seed_of(0, "a", 1),
        seed_of(1, "a", 1),
        seed_of(0, "b", 1),
        seed_of(0, "a", 2),
        seed_of(0, "a"),
        seed_of(0, "a1"),
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(3, "crop", 17) == 3587349383990432701  # of this and every other machine


def test_every_pass_is_another_permutation_of_all_images():
    draws = [draw for batch in take(StepSampler(7, [Stage(None, 5, 8)], seed=2), 14) for draw in batch]
    assert [draw.number for draw in draws] == list(range(70))
    passes = [tuple(draw.index for draw in draws[i : i + 7]) for i in range(0, 70, 7)]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert len(set(passes)) > 5
    again = StepSampler(7, [Stage(None, 5, 8)], seed=3)
    assert [draw.index for batch in take(again, 14) for draw in batch] != [draw.index for draw in draws]


def test_stages_switch_crop_and_batch_at_their_step():
    batches = take(StepSampler(7, STAGES), 7)
    assert [len(batch) for batch in batches] == [8, 8, 8, 4, 4, 2, 2]
    assert [batch[0].crop for batch in batches] == [16, 16, 16, 24, 24, 32, 32]


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 2)])
def test_ranks_and_accumulation_share_the_same_draws(world, accumulate):
    whole = take(StepSampler(7, STAGES, 5), 6)
    parts = [
        take(StepSampler(7, STAGES, 5, rank, world, accumulate=accumulate), 6 * accumulate) for rank in range(world)
    ]
    for step, batch in enumerate(whole):
        shares = [parts[rank][step * accumulate + part] for part in range(accumulate) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1
        assert [draw for share in shares for draw in share] == batch


def test_any_start_continues_the_unbroken_list():
    whole = take(StepSampler(7, STAGES, 5, accumulate=2), 16)
    for start in range(16):
        rest = StepSampler(7, STAGES, 5, start_step=start // 2, start_part=start % 2, accumulate=2)
        assert take(rest, 16 - start) == whole[start:]


GROUPS = [0, 1, 0, 2, 0, 0, 1]


def grouped(stage):
    return GROUPS if stage.patch_size < 32 else [number // 3 for number in range(7)]


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("counts", [(1,), (5, 40, 15), (100, 1, 1, 30), (7, 7, 7)])
def test_grouped_batches_hold_one_group_and_every_image_as_often(counts, batch):
    groups = np.random.RandomState(0).permutation(np.repeat(np.arange(len(counts)), counts))
    order = GroupedOrder(groups, batch, seed=1)
    passes = 5 * batch
    total = passes * len(groups) // batch  # after so many passes no group owes anything
    batches = [order.batch(number) for number in range(total)]
    assert all(len(set(groups[images])) == 1 for images in batches)
    assert set(np.bincount(np.concatenate(batches), minlength=len(groups))) == {passes}
    for end in (total // 7, total // 2, total - 1):  # on the way no image is far ahead or behind
        seen = np.bincount(np.concatenate([*batches[:end], []]).astype(int), minlength=len(groups))
        fair = end * batch / len(groups)
        for group, count in enumerate(counts):
            assert np.ptp(seen[groups == group]) <= 1
            assert abs(seen[groups == group].mean() - fair) <= 1 + (batch * len(counts)) / len(groups) + batch / count
    random_access = GroupedOrder(groups, batch, seed=1)
    for number in (total - 1, 0, total // 3, total // 2):
        assert random_access.batch(number) == batches[number]


def test_grouped_batches_are_shuffled_and_depend_on_the_seed():
    groups = [number % 2 for number in range(400)]
    first, other = (GroupedOrder(groups, 10, seed) for seed in (1, 2))
    batches = [first.batch(number) for number in range(80)]
    assert batches != [other.batch(number) for number in range(80)]
    kinds = [groups[images[0]] for images in batches]
    assert 5 < sum(a != b for a, b in itertools.pairwise(kinds[:40])) < 35
    assert kinds[:40] != kinds[40:]
    assert {tuple(sorted(b)) for b in batches[:40]}.isdisjoint({tuple(sorted(b)) for b in batches[40:]})


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 2)])
def test_ranks_and_accumulation_share_grouped_batches(world, accumulate):
    whole = take(StepSampler(7, STAGES, 5, groups=grouped), 12)
    assert [draw.number for batch in whole for draw in batch] == list(range(sum(map(len, whole))))
    for step, batch in enumerate(whole):
        groups = grouped(Stage(None, 1, batch[0].crop))
        assert len({groups[draw.index] for draw in batch}) == 1, step
    options = {"accumulate": accumulate, "groups": grouped}
    parts = [take(StepSampler(7, STAGES, 5, rank, world, **options), 12 * accumulate) for rank in range(world)]
    for step, batch in enumerate(whole):
        shares = [parts[rank][step * accumulate + part] for part in range(accumulate) for rank in range(world)]
        assert [draw for share in shares for draw in share] == batch
    for start in range(12):
        assert take(StepSampler(7, STAGES, 5, start_step=start, groups=grouped), 12 - start) == whole[start:]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 4])
def test_samples_do_not_depend_on_workers(workers):
    one, many = loader(), loader(workers=workers)
    assert rows([*one, *one]) == rows([*many, *many])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 3, 4, 6])  # within, and at the end of, the first epoch; within the second
def test_position_counts_batches_handed_out_not_those_prepared(workers, stop):
    unbroken = loader()
    expected = rows([*unbroken, *unbroken, *unbroken])
    killed = loader(workers=workers)  # two workers prepare four batches ahead
    seen = rows(take(itertools.chain(killed, killed), stop))
    state = killed.state_dict()
    assert state == {"step": stop, "part": 0}
    resumed = loader(workers=workers)
    take(resumed, 2)  # whatever was begun, or prepared, before the position is restored is dropped
    resumed.load_state_dict(state)
    seen += rows(take(itertools.chain(resumed, resumed, resumed), 12 - stop))
    assert seen == expected


def test_position_is_kept_in_steps_when_the_number_of_ranks_changes():
    single = loader()
    expected = rows([*single, *single])
    two = [loader(world=2, rank=rank, accumulate=1) for rank in range(2)]
    for one in two:
        take(one, 3)
    joined = loader()
    joined.load_state_dict(two[0].state_dict())
    assert rows(take(itertools.chain(joined, joined), 5)) == expected[3:]


def test_accumulated_batches_of_a_step_resume_too():
    unbroken = loader(accumulate=2)
    assert len(unbroken) == 8
    expected = rows(unbroken)
    killed = loader(accumulate=2)
    take(killed, 3)
    assert killed.state_dict() == {"step": 1, "part": 1}
    resumed = loader(accumulate=2)
    resumed.load_state_dict(killed.state_dict())
    assert rows(take(resumed, 5)) == expected[3:]


def test_one_epoch_is_what_len_says_and_epochs_continue():
    source = loader()
    first, second = rows(source), rows(source)
    assert len(first) == len(second) == len(source) == 4
    assert first[0][0][0][0] == 0
    assert second[0][0][0][0] == 8 * 3 + 4  # the first draw of step 4


def test_loading_leaves_the_global_generators_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(loader(workers=1))
    list(loader())
    assert torch.equal(torch.rand(3), expected)


class Fragile(Numbers):
    broken = True

    def __getitem__(self, draw):
        if self.broken and draw.number >= 8:
            raise OSError("disk gone")
        return super().__getitem__(draw)


def test_an_error_is_passed_on_and_the_position_survives_it():
    source = ResumableLoader(Fragile(), STAGES, 1, epoch_steps=4)
    with pytest.raises(OSError, match="disk gone"):
        list(source)
    assert source.state_dict()["step"] == 1
    source.dataset.broken = False
    assert rows(source)[0] == rows(loader())[1]


class Signalled(Numbers):
    def __getitem__(self, draw):
        os.kill(os.getpid(), signal.SIGINT)  # what Ctrl-C does to the whole process group
        return super().__getitem__(draw)


def test_workers_leave_ctrl_c_to_the_run():
    assert rows(ResumableLoader(Signalled(), STAGES, 1, epoch_steps=2, workers=1)) == rows(loader(epoch_steps=2))


def test_impossible_requests_are_one_sentence():
    with pytest.raises(UserError, match="holds no image"):
        StepSampler(0, STAGES)
    with pytest.raises(UserError, match="cannot be shared by 4 ranks"):
        loader(world=4)
    with pytest.raises(UserError, match="workers must be >= 0"):
        loader(workers=-1)
    with pytest.raises(UserError, match="epoch_steps >= 1, got 0 and 0"):
        loader(epoch_steps=0)
    assert Draw(1, 2, 3) == (1, 2, 3)
