import pytest

from finetuning.ranks import get_local_rank, get_rank, get_world_size, is_main_process


@pytest.mark.parametrize("value", ["", "none", "-1"])
def test_a_rank_that_is_no_number_is_that_of_a_process_alone(monkeypatch, value):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, value)
    assert (get_rank(), get_local_rank(), get_world_size(), is_main_process()) == (0, 0, 1, True)
