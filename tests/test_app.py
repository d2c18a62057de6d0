"""app.py in a real browser, as its user sees it."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
from browser import chromium, requests
from commandline import ROOT, command, warm_python
from conftest import make_images
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

import app


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("cwd")
    folder = make_images(cwd / "images", classes=("cross", "ring", "bar"))
    short = ("--epochs", 3, "--batch_size", 8, "--width", 4, "--lr_max", 0.1, "--name", "run")
    done = command("train.py", "--data", folder, *short, cwd=cwd, drawn=False)
    assert done.returncode == 0, done.stderr
    Image.open(folder / "test/ring/0.png").resize((90, 120)).save(cwd / "photo.jpg")
    (cwd / "text.png").write_text("not an image")
    return cwd / "runs/run"


@contextmanager
def serving(*words, cwd):
    """The page's address, while it is served."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    process = subprocess.Popen([warm_python(), *map(str, words), "--port", str(port)], cwd=cwd)
    try:
        while True:
            assert process.poll() is None
            try:
                urllib.request.urlopen(address, timeout=60).close()
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait()


@pytest.mark.slow
def test_upload_a_photo_and_see_the_evidence(run):
    with serving(ROOT / "app.py", run, cwd=run) as address, chromium(height=1600) as chrome:
        chrome.get(address)
        wait = WebDriverWait(chrome, 600)
        upload = wait.until(lambda c: c.find_element(By.CSS_SELECTOR, "#image input[type=file]"))
        upload.send_keys(str(run.parents[1] / "photo.jpg"))
        wait.until(lambda c: "%" in c.find_element(By.ID, "label").text)
        said = chrome.find_element(By.ID, "label").text
        assert {"cross", "ring", "bar"} <= {*said.split()}
        shown = lambda c: c.find_element(By.CSS_SELECTOR, "#heat img").get_attribute("src")  # noqa: E731
        before = wait.until(shown)
        opacity = chrome.find_element(By.CSS_SELECTOR, "#opacity input[type=number]")
        opacity.clear()
        opacity.send_keys("0.9\t")
        wait.until(lambda c: shown(c) != before)
        assert [url for url in requests(chrome) if not url.startswith((address, "data:", "blob:"))] == []
        assert [entry for entry in chrome.get_log("browser") if entry["level"] == "SEVERE"] == []
        thumbnails = chrome.find_elements(By.CSS_SELECTOR, "button img, .gallery img")
        assert len(thumbnails) >= 10
        for caption in chrome.find_elements(By.CSS_SELECTOR, "#misclassified .caption-label"):  # none is cut off
            assert chrome.execute_script("return arguments[0].scrollWidth <= arguments[0].clientWidth", caption)
        chrome.get(address)
        upload = wait.until(lambda c: c.find_element(By.CSS_SELECTOR, "#image input[type=file]"))
        upload.send_keys(str(run.parents[1] / "text.png"))
        wait.until(lambda c: "can't be read as an image" in c.find_element(By.TAG_NAME, "body").text)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 25])
def test_small_images_are_enlarged_and_captions_are_whole(run, tmp_path, count):
    """On a wide and on a narrow screen: the images of the gallery have one size, whatever their number."""
    shutil.copy(run / "model.safetensors", tmp_path)
    shutil.copytree(run / "examples", tmp_path / "examples")
    image = next((run / "examples").iterdir())
    (tmp_path / "misclassified").mkdir()
    for number in range(count):
        name = f"{number:02}-cross, predicted {'a very long name, of which this is all' if number else 'ring'}.png"
        shutil.copy(image, tmp_path / "misclassified" / name)
    with serving(ROOT / "app.py", tmp_path, cwd=tmp_path) as address:
        for width, in_a_row in ((1280, 10), (360, 2)):
            with chromium(width=width) as chrome:
                chrome.get(address)
                wait = WebDriverWait(chrome, 600)
                upload = wait.until(lambda c: c.find_element(By.CSS_SELECTOR, "#image input[type=file]"))
                upload.send_keys(str(image))
                for name in ("image", "heat"):
                    (shown,) = wait.until(lambda c, name=name: c.find_elements(By.CSS_SELECTOR, f"#{name} img"))
                    wait.until(lambda c, shown=shown: min(shown.size.values()) > 200)
                    if name == "image":
                        wait.until(lambda c, shown=shown: shown.value_of_css_property("image-rendering") == "pixelated")
                tiles = wait.until(lambda c: c.find_elements(By.CSS_SELECTOR, "#misclassified .thumbnail-item"))
                parts = (By.CSS_SELECTOR, "img"), (By.CSS_SELECTOR, ".caption-label")
                images, captions = zip(*([tile.find_element(*part) for part in parts] for tile in tiles))
                assert len(tiles) == count
                assert [tile.rect["y"] for tile in tiles].count(tiles[0].rect["y"]) == min(count, in_a_row)
                for tile, shown, caption in zip(tiles, images, captions, strict=True):
                    assert 70 <= shown.rect["width"] <= 130
                    assert shown.rect["height"] == pytest.approx(shown.rect["width"], abs=1)
                    assert caption.rect["y"] >= shown.rect["y"] + shown.rect["height"] - 1
                    assert caption.rect["y"] + caption.rect["height"] <= tile.rect["y"] + tile.rect["height"] + 1
                    for side in ("Width", "Height"):
                        script = f"return arguments[0].scroll{side} <= arguments[0].client{side}"
                        assert chrome.execute_script(script, caption)
                assert chrome.execute_script("return document.documentElement.scrollWidth") <= width


@pytest.mark.slow
def test_only_images_of_the_report_are_served(run):
    with serving(ROOT / "app.py", run / "model.safetensors", cwd=run) as address:
        example = next((run / "examples").iterdir())
        assert urllib.request.urlopen(f"{address}/gradio_api/file={example}").read() == example.read_bytes()
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{address}/gradio_api/file={run / 'config.json'}")


@pytest.mark.slow
def test_many_at_once(run):
    from gradio_client import Client, handle_file

    file = handle_file(str(run.parents[1] / "photo.jpg"))

    def visit(address):
        """As a visitor of one's own: of calls of one client, Gradio cancels those that it sends while others end."""
        client = Client(address, verbose=False, httpx_kwargs=dict(timeout=900))
        return client.predict(file, 3, "layer2", "ring", 0.5, api_name="/explain")

    with (
        serving(ROOT / "app.py", run, cwd=run) as address,
        ThreadPoolExecutor(20) as pool,
    ):  # Grad-CAM hooks into the model
        probabilities, images = zip(*(job.result() for job in [pool.submit(visit, address) for _ in range(20)]))
    assert all(answer == probabilities[0] for answer in probabilities)
    assert {entry["label"] for entry in probabilities[0]["confidences"]} == {"cross", "ring", "bar"}
    classifier = app.ImageClassifier.load(run, app.ResNet)
    _, expected = app.explain(classifier, str(run.parents[1] / "photo.jpg"), 3, "layer2", "ring", 0.5)
    paths = [image if isinstance(image, str) else image["path"] for image in images]
    assert len({*paths}) == 20  # or one would be written while another request downloads it
    for path in paths:
        difference = np.asarray(Image.open(path).convert("RGB")).astype(int) - np.asarray(expected)
        assert abs(difference).mean() < 8  # Gradio compresses the picture


def test_the_functions(run):
    classifier = app.ImageClassifier.load(run, app.ResNet)
    photo = str(run.parents[1] / "photo.jpg")
    show = partial(app.explain, classifier, photo, 2, "layer1")
    found, one = show("ring", 0.5)
    _, other = show("cross", 0.5)
    assert len(found) == 2 and list(found.values()) == sorted(found.values(), reverse=True)
    assert one.size == (320, 320) and one.tobytes() != other.tobytes()
    assert show(app.LIKELIEST, 0.5)[1].tobytes() == show(next(iter(found)), 0.5)[1].tobytes()
    assert app.explain(classifier, None, 2, "layer1", "ring", 0.5) == (None, None)


@pytest.mark.parametrize("host, port, says", [
    ("192.0.2.7", None, r"192.0.2.7 can't be listened to \(.*\); give another --host or --port"),
    ("a" * 70, None, r"a{70} can't be listened to \(.*\); give"),
    ("no.such.host.invalid", 7000, r"no.such.host.invalid, port 7000, can't be listened to"),
])  # fmt: skip
def test_an_address_of_another_computer_is_refused_at_once(host, port, says):
    with pytest.raises(app.UserError, match=says):
        app.check_address(host, port)


def test_a_name_needs_only_one_address_that_this_computer_uses(monkeypatch):
    """As `localhost` where IPv6 is off."""
    ours = socket.getaddrinfo("127.0.0.1", 0, type=socket.SOCK_STREAM)
    foreign = socket.getaddrinfo("192.0.2.7", 0, type=socket.SOCK_STREAM)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: foreign + ours)
    app.check_address("localhost", None)


def test_a_port_that_is_taken_is_refused():
    app.check_address("127.0.0.1", None)
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(app.UserError, match="in use"):
        app.check_address("127.0.0.1", other.getsockname()[1])


def test_without_gradio(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(
        app.UserError, match=r"gradio, which this needs, is not installed; install it with `make extras`"
    ):
        app.build(app.ImageClassifier.load(run, app.ResNet), run)


@pytest.mark.parametrize("host, variables, address", [
    (None, {}, "127.0.0.1"),
    (None, {"GRADIO_SERVER_NAME": "0.0.0.0"}, "0.0.0.0"),
    ("localhost", {"GRADIO_SERVER_NAME": "0.0.0.0"}, "localhost"),
])  # fmt: skip
def test_where_the_page_can_be_reached(run, monkeypatch, host, variables, address):
    class Page:
        def launch(self, server_name, **_):
            found.append(server_name)
            return None, "http://somewhere", None

        def block_thread(self):
            pass

    found = []
    monkeypatch.delenv("GRADIO_SERVER_NAME", raising=False)
    monkeypatch.setenv("no_proxy", "elsewhere")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(app, "build", lambda *_: Page())
    app.main(run=str(run), host=host)
    assert found == [address] and os.environ["no_proxy"] == "elsewhere,127.0.0.1,localhost"
