"""How arrays lie on devices, and what processes agree on."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from soft_jax import distributed
from soft_jax.errors import UserError


@pytest.fixture
def reordering(monkeypatch):
    """`jax.make_mesh` as on a TPU slice: it takes the devices in an order of its own."""

    def make_mesh(shape, names, *, axis_types=None, devices=None):
        devices = list(devices or jax.devices())
        return Mesh(np.array(devices[::-1]).reshape(shape), names, axis_types=axis_types)

    monkeypatch.setattr(jax, "make_mesh", make_mesh)


@pytest.mark.usefixtures("reordering")
@pytest.mark.parametrize("given", [None, [0, 1, 2, 3], [2, 0, 3, 1], [3, 1]])
def test_devices_stand_in_order(given):
    devices = jax.devices()
    mesh = distributed.data_mesh(given and [devices[index] for index in given])
    assert mesh.devices.tolist() == [devices[index] for index in sorted(given or range(4))]
    assert mesh.axis_names == ("data",)
    assert mesh.axis_types == (AxisType.Auto,)


def test_devices_stand_process_by_process(monkeypatch):
    """A v4-16 lists its devices for processes 0, 1, 0, 1."""
    monkeypatch.setattr(distributed, "Mesh", lambda devices, names, axis_types: devices)
    listed = [SimpleNamespace(process_index=i % 2, id=i) for i in range(4)]
    order = [(device.process_index, device.id) for device in distributed.data_mesh(listed)]
    assert order == [(0, 0), (0, 2), (1, 1), (1, 3)]
    with pytest.raises(UserError, match=r"have \[1, 2\] devices; expected the same number"):
        distributed.data_mesh(listed[:3])


@pytest.mark.usefixtures("reordering")
def test_rows_lie_on_the_devices_in_order():
    """The first rows on the first device, and so padding, which is last, on the last."""
    rows = np.arange(8)
    for place in (distributed.to_global, distributed.local_to_global):
        array = place(rows, distributed.by_row(distributed.data_mesh()))
        for shard in array.addressable_shards:
            first = 2 * jax.devices().index(shard.device)
            assert shard.data.tolist() == [first, first + 1]
        np.testing.assert_array_equal(distributed.to_host(array), rows)


def test_what_is_replicated_is_whole_on_every_device():
    array = distributed.to_global(np.arange(3), distributed.replicated(distributed.data_mesh()))
    assert [shard.data.tolist() for shard in array.addressable_shards] == [[0, 1, 2]] * 4


def test_one_process_agrees_with_itself():
    assert distributed.all_max(3, -5) == (3, -5)
    assert distributed.from_primary(3, -5) == (3, -5)
    assert distributed.from_primary() == ()
    assert distributed.run_on_all(lambda: "done") == "done"
    distributed.check_equal({"seed": 1})
    distributed.barrier()


# Run by each of two processes with two devices; `index` is which one it is.
PROGRAM = """
    import sys
    import numpy as np
    from soft_jax import distributed
    from soft_jax.errors import UserError
    from soft_jax.inference import engine

    address, index = sys.argv[1], int(sys.argv[2])
    distributed.join(f"{address},{index},2")
    assert distributed.is_primary() == (index == 0)
    assert distributed.from_primary(10 + index, -index) == (10, 0)
    assert distributed.all_max(10 + index, -index) == (11, 0)

    mesh = distributed.data_mesh()
    by_row = distributed.by_row(mesh)
    assert [device.process_index for device in mesh.devices] == [0, 0, 1, 1]
    whole = np.arange(16 * 3 * 2, dtype=np.float32).reshape(16, 3, 2)
    tokens = distributed.local_to_global(whole[8 * index : 8 * index + 8], by_row)
    np.testing.assert_array_equal(distributed.to_host(tokens), whole)

    # Images that the other process holds, too: all of them are one device's, two of each part.
    batching, images = engine.Batching(mesh, 8), np.array([14, 15, 6, 7, 14, 14, 15])
    parts = [batching.put(whole[:8], 8), batching.put(whole[8:], 8)]
    joined = engine.join_tokens(parts, [8, 8], batching.chunk, batching)
    taken = distributed.to_host(engine.take_rows(joined, images, 8, batching))
    np.testing.assert_array_equal(taken[: len(images)], whole[images])

    def fails():
        raise UserError("the reason")

    for others_settings in ({"seed": 1}, {"seed": index}):
        try:
            distributed.check_equal(others_settings)
            print("said: equal")
        except UserError as error:
            print("said:", error)
    try:
        distributed.run_on_all(fails if index else lambda: None)
    except UserError as error:
        print("said:", error)
    distributed.barrier()
"""


def test_two_processes_agree():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROGRAM), address, str(index)],
            cwd=Path(__file__).parent.parent,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    for (output, _), reason in zip(
        outputs, ("another process of this run can't go on", "the reason"), strict=True
    ):
        equal, different, failed = (
            line.removeprefix("said: ") for line in output.splitlines() if line.startswith("said: ")
        )
        assert equal == "equal"
        assert different.startswith("distributed: the processes were given different settings")
        assert failed.startswith(reason)
