"""What processes say to each other, on one process; the runs on all engines assert the rest."""

from datetime import timedelta

import pytest
import torch

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.engines import collectives


def test_one_process_decides_for_itself():
    assert collectives.decide_on_rank_zero(lambda: 5) == 5
    values = {index: torch.tensor([index]) for index in (2, 0, 1)}
    assert collectives.gather_on_rank_zero(values, [0]).tolist() == [[0], [1], [2]]
    collectives.wait_for_everyone()
    with pytest.raises(LayerselError, match="no"):
        collectives.decide_on_rank_zero(lambda: (_ for _ in ()).throw(LayerselError("no")))


def test_a_store_ends_its_waiting_with_an_error_of_its_own():
    assert callable(torch.distributed.distributed_c10d._get_default_store)
    with pytest.raises(torch.distributed.DistStoreError):
        torch.distributed.HashStore().wait(["never"], timedelta(seconds=0.1))
