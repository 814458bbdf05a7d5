import _thread
import dataclasses
import hashlib
import http.server
import socket
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from soft_jax import pytrees
from soft_jax.errors import Stopped, UserError
from soft_jax.models import backbones, vit_checkpoints
from soft_jax.models.vit import ViTConfig
from tests.conftest import TINY

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def google():
    with np.load(DATA / "google_vit.npz") as file:
        return {key: file[key] for key in file.files}


def google_arrays(google):
    return {
        key.removeprefix("checkpoint/"): value
        for key, value in google.items()
        if key.startswith("checkpoint/")
    }


def google_config(arrays):
    depth = sum(key.endswith("Dense_0/bias") for key in arrays)
    return ViTConfig(16, 4, 24, depth, 3, 48)


def test_google_features(google):
    """Google's own model computed these from this checkpoint, in float32 with the one-pass
    variance: hence the tolerance.
    """
    arrays = google_arrays(google)
    vit = google_config(arrays)
    params, left_out = vit.convert(arrays)
    assert left_out == ("head/bias", "head/kernel", "pre_logits/bias", "pre_logits/kernel")
    features = jax.jit(vit.features)(params, google["images"])
    np.testing.assert_allclose(features, google["features"], atol=5e-5)


def test_google_released_numbering(google):
    """The released files number LayerNorm_0 and _2, attention 1 and MLP 3."""
    arrays = google_arrays(google)
    vit = google_config(arrays)
    names = {
        "LayerNorm_1": "LayerNorm_2",
        "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
        "MlpBlock_0": "MlpBlock_3",
    }
    released = {}
    for key, value in arrays.items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        released[key] = value
    jax.tree.map(
        np.testing.assert_array_equal,
        vit.convert(arrays)[0],
        vit.convert(released)[0],
    )


def test_every_array_is_used_or_refused(google):
    arrays = google_arrays(google)
    vit = google_config(arrays)
    params, left_out = vit.convert(arrays)
    used = sum(v.size for k, v in arrays.items() if k not in left_out)
    assert pytrees.count(params) == used
    with pytest.raises(ValueError, match="array 'surprise' has no place in this ViT"):
        vit.convert(arrays | {"surprise": np.zeros(3)})


def test_bundled_backbone():
    backbone = backbones.load("vit_ti8_32")
    assert (
        backbone.fingerprint == "222bec5caee26212771e6aa3754dd06608afa4fd23dcf792b1be87d20ada43de"
    )
    assert (
        backbone.fingerprint
        == hashlib.sha256(backbones.locate("vit_ti8_32").read_bytes()).hexdigest()
    )
    assert pytrees.count(backbone.params) == 5_379_264
    assert backbone.left_out == ()
    assert {leaf.dtype for leaf in jax.tree.leaves(backbone.params)} == {np.dtype("float32")}


def test_positions_for_another_image_size():
    larger = backbones.load("vit_ti8_32", image_size=64)
    assert larger.params["pos_embed"].shape == (1, 65, 192)
    images = np.zeros((1, 64, 64, 3), np.float32)
    features = jax.eval_shape(larger.architecture.features, larger.params, images)
    assert features.shape == (1, 192)
    native = backbones.load("vit_ti8_32").params["pos_embed"]
    np.testing.assert_array_equal(larger.params["pos_embed"][:, 0], native[:, 0])
    # A plane stays a plane away from the borders, whatever the size.
    ramp = np.concatenate(
        [np.zeros((1, 1, 1)), np.arange(8.0).repeat(8).reshape(1, 64, 1)], axis=1
    ).astype(np.float32)
    resized = vit_checkpoints.interpolate_positions(ramp, 16)[0, 1:, 0].reshape(16, 16)
    np.testing.assert_allclose(np.diff(resized[4:12], axis=0), 0.5, atol=1e-5)


def test_file_that_does_not_fit(tmp_path, google):
    file = tmp_path / "other.npz"
    np.savez(file, **google_arrays(google))
    with pytest.raises(UserError, match=r"other.npz does not fit 'vit_ti8_32'"):
        backbones.load("vit_ti8_32", str(file))
    timm = dict(np.load(backbones.locate("vit_ti8_32")))
    np.savez(file, **{k: v for k, v in timm.items() if k != "blocks.3.mlp.fc1.bias"})
    with pytest.raises(UserError, match=r"array 'blocks.3.mlp.fc1.bias' is missing"):
        backbones.load("vit_ti8_32", str(file))
    np.savez(file, **timm | {"norm.weight": np.zeros(7, np.float16)})
    with pytest.raises(UserError, match=r"array 'norm.weight' is \(7,\), expected \(192,\)"):
        backbones.load("vit_ti8_32", str(file))
    np.savez(file, **timm | {"blocks.12.norm1.weight": np.zeros(192, np.float16)})
    with pytest.raises(UserError, match="13 layers, expected 12"):
        backbones.load("vit_ti8_32", str(file))


def test_safetensors_hold_the_same(tmp_path):
    """As timm's models on the Hub come; and damage has a name there too."""
    file = tmp_path / "model.safetensors"
    arrays = {
        name: np.ascontiguousarray(array)
        for name, array in np.load(backbones.locate("vit_ti8_32")).items()
    }
    safetensors.numpy.save_file(arrays, file)
    jax.tree.map(
        np.testing.assert_array_equal,
        backbones.load("vit_ti8_32", str(file)).params,
        backbones.load("vit_ti8_32").params,
    )
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"model.safetensors is not a readable .safetensors file"):
        backbones.load("vit_ti8_32", str(file))


def test_cached_files_do_not_take_each_others_place():
    files = [source.file for source in backbones.BACKBONES.values()]
    assert len(set(files)) == len(files)


def test_files_that_can_not_be_read(tmp_path):
    with pytest.raises(UserError, match="backbone: 'vit_x' is unknown; .*known are vit_b16"):
        backbones.load("vit_x")
    with pytest.raises(UserError, match=r"backbone_path: no file at .*nowhere.npz"):
        backbones.load("vit_b16", str(tmp_path / "nowhere.npz"))
    short = tmp_path / "short.npz"
    short.write_bytes(backbones.locate("vit_ti8_32").read_bytes()[:100_000])
    with pytest.raises(UserError, match=r"short.npz is not a readable .npz file"):
        backbones.load("vit_ti8_32", str(short))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "words.npz").write_text("<html>Not found</html>")
    (tmp_path / "empty.npz").touch()
    for name in ("array.npy", "words.npz", "empty.npz"):
        with pytest.raises(UserError, match=rf"{name} is not a readable .npz file .*this is none"):
            backbones.load("vit_ti8_32", str(tmp_path / name))
    with pytest.raises(UserError, match="image_size: image_size 30 is not a multiple"):
        backbones.load("vit_ti8_32", image_size=30)


@pytest.fixture
def far(tmp_path, monkeypatch):
    """A backbone "vit_far" with a URL, its file there, and an empty cache."""
    origin = tmp_path / "origin" / "ViT-B_16.npz"
    origin.parent.mkdir()
    origin.write_bytes(backbones.locate("vit_ti8_32").read_bytes())
    source = dataclasses.replace(
        backbones.BACKBONES["vit_ti8_32"], file=origin.name, url=origin.as_uri(), sha256=""
    )
    monkeypatch.setitem(backbones.BACKBONES, "vit_far", source)
    monkeypatch.setattr(backbones, "CACHE", tmp_path / "cache")
    monkeypatch.setenv("no_proxy", "*")
    return origin


def change_far(monkeypatch, **fields):
    source = dataclasses.replace(backbones.BACKBONES["vit_far"], **fields)
    monkeypatch.setitem(backbones.BACKBONES, "vit_far", source)


def test_download(far, tmp_path, monkeypatch):
    """From a URL into the cache; a failed download leaves nothing behind and says where to put a
    copy.
    """
    assert pytrees.count(backbones.load("vit_far").params) == 5_379_264
    far.unlink()
    assert backbones.load("vit_far").name == "vit_far"  # from the cache
    monkeypatch.setattr(backbones, "CACHE", tmp_path / "empty")
    with pytest.raises(
        UserError, match=r"could not be downloaded from file://.*backbone_path=FILE"
    ):
        backbones.load("vit_far")
    assert list((tmp_path / "empty").iterdir()) == []


def resaved(file):
    """Write other bytes of the same arrays to `file`; return their SHA-256."""
    arrays = dict(np.load(backbones.locate("vit_ti8_32")))
    np.savez(file, **{name: arrays[name] for name in reversed(arrays)})
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_the_first_download_is_remembered(far, tmp_path):
    first = backbones.load("vit_far").fingerprint
    cached = tmp_path / "cache/ViT-B_16.npz"
    record = tmp_path / "cache/ViT-B_16.npz.sha256"
    assert record.read_text() == f"{first}  ViT-B_16.npz\n"
    # The copy changes.
    other = resaved(cached)
    with pytest.raises(UserError, match=rf"ViT-B_16.npz has SHA-256 {other}, but .* had {first}"):
        backbones.load("vit_far")
    # It is fetched again, and the publisher's has changed.
    cached.unlink()
    assert resaved(far) == other
    with pytest.raises(UserError, match=rf"has SHA-256 {other}, but .* had {first}; delete it"):
        backbones.load("vit_far")
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [record.name]
    # What the message says helps.
    record.unlink()
    assert backbones.load("vit_far").fingerprint == other


def test_a_cached_copy_of_before_is_remembered_too(far, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/ViT-B_16.npz").write_bytes(far.read_bytes())
    sha256 = backbones.load("vit_far").fingerprint
    assert (tmp_path / "cache/ViT-B_16.npz.sha256").read_text().startswith(sha256)


def test_the_publishers_sha256_is_held_against_a_download(far, tmp_path, monkeypatch):
    right = hashlib.sha256(far.read_bytes()).hexdigest()
    change_far(monkeypatch, sha256=right)
    other = resaved(far)
    with pytest.raises(UserError, match=f"SHA-256 {other}, but its publisher gives {right}"):
        backbones.load("vit_far")
    assert list((tmp_path / "cache").iterdir()) == []
    # A bundled file is compared as well.
    change_far(monkeypatch, url="", file="vit_ti8_32.npz", sha256="0" * 64)
    with pytest.raises(UserError, match=f"SHA-256 {right}, but its publisher gives 0000"):
        backbones.load("vit_far")


class Hub(http.server.BaseHTTPRequestHandler):
    """Redirects to its storage with the SHA-256 of what is there, as the Hugging Face Hub does.

    /hub: the right one; /wrong: another; /short: half of what it promises; /stalled: half of it,
    then silence; /missing: 404.
    """

    content = b""
    sha256 = ""
    go_on = threading.Event()

    def do_GET(self):
        if self.path in ("/hub", "/wrong"):
            self.send_response(302)
            self.send_header("Location", "/storage")
            linked = self.sha256 if self.path == "/hub" else "f" * 64
            self.send_header("X-Linked-Etag", f'"{linked}"')
            self.end_headers()
        elif self.path == "/missing":
            self.send_error(404)
        else:
            whole = self.path == "/storage"
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.content)))
            self.end_headers()
            self.wfile.write(self.content if whole else self.content[: len(self.content) // 2])
            if self.path == "/stalled":
                self.wfile.flush()
                self.go_on.wait(30)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(far):
    Hub.content = far.read_bytes()
    Hub.sha256 = hashlib.sha256(Hub.content).hexdigest()
    Hub.go_on.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    Hub.go_on.set()
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_hubs_sha256_is_held_against_a_download(hub, tmp_path, monkeypatch):
    change_far(monkeypatch, url=f"{hub}/wrong")
    with pytest.raises(UserError, match=f"SHA-256 {Hub.sha256}, but its publisher gives ffff"):
        backbones.load("vit_far")
    assert list((tmp_path / "cache").iterdir()) == []
    change_far(monkeypatch, url=f"{hub}/hub")
    assert backbones.load("vit_far").fingerprint == Hub.sha256


@pytest.mark.parametrize(
    ("page", "because"),
    [
        ("missing", "HTTP Error 404"),
        ("short", "5399925 of 10799850 bytes arrived"),
        ("stalled", "no answer for 0.3 seconds|timed out"),
    ],
)
def test_a_download_that_breaks_off_leaves_nothing(hub, tmp_path, monkeypatch, page, because):
    monkeypatch.setattr(backbones, "PATIENCE", 0.3)
    change_far(monkeypatch, url=f"{hub}/{page}")
    with pytest.raises(UserError, match=rf"from {hub}/{page} \(.*({because})") as raised:
        backbones.load("vit_far")
    assert "backbone_path=FILE" in str(raised.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_look_up_without_end_is_given_up(far, tmp_path, monkeypatch):
    """The look-up of a host's name takes no time limit, and hears no signal."""
    go_on = threading.Event()

    def hang(*_, **__):
        go_on.wait(30)
        raise OSError("the look-up ended")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    monkeypatch.setattr(backbones, "PATIENCE", 0.3)
    change_far(monkeypatch, url="http://weights.example/ViT-B_16.npz")
    with pytest.raises(UserError, match="no answer for 0.3 seconds"):
        backbones.load("vit_far")
    go_on.set()


def test_ctrl_c_ends_a_download(hub, tmp_path, monkeypatch):
    """It is heard while the network is silent, and no partial file stays."""
    change_far(monkeypatch, url=f"{hub}/stalled")
    started = backbones._Transfer.finish

    def finish(transfer):
        threading.Timer(0.2, _thread.interrupt_main).start()
        started(transfer)

    monkeypatch.setattr(backbones._Transfer, "finish", finish)
    with pytest.raises(KeyboardInterrupt):
        backbones.load("vit_far")
    assert not Hub.go_on.is_set()
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_download_can_be_stopped(hub, tmp_path, monkeypatch):
    """As a signal to a run does it: at once, and no partial file stays."""
    change_far(monkeypatch, url=f"{hub}/stalled")
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    with pytest.raises(Stopped):
        backbones.load("vit_far", stop=stop)
    assert not Hub.go_on.is_set()
    assert list((tmp_path / "cache").iterdir()) == []


def test_tiny_config_is_what_the_tests_say():
    assert (TINY.grid, TINY.head_dim) == (4, 8)
