"""export.py --web in a real browser without a network, with images of all kinds, for eyes, keyboards and ears."""

import functools
import hashlib
import html
import http.server
import json
import re
import tarfile
import threading
from base64 import b64encode
from contextlib import contextmanager
from io import BytesIO

import numpy as np
import pytest
import torch
from browser import chromium, requests, set_screen
from commandline import ROOT, command
from conftest import save_classifier
from PIL import Image, ImageCms, ImageFilter
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from cifar10.data.decode import RESIZE, decode_image
from cifar10.errors import UserError
from cifar10.interpretation import ImageClassifier, webpage
from model import ResNet

EVIL = "</script><b>R&D</b> \"'{{about}}"
CLASSES = ("cross", EVIL, "a long name of a class " * 4, "قطة", "環 🐱")


@pytest.fixture(scope="session")
def runtime():
    """ONNX Runtime Web, downloaded once to the tests' fastai home as export.py does it."""
    try:
        webpage.read_runtime()
    except UserError as reason:
        if "can't be downloaded" not in str(reason):
            raise
        pytest.skip(f"needs the npm registry: {reason}")


def export(run, folder):
    done = command("export.py", run, "--web", folder, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    assert "the same classes as PyTorch on 100 images" in done.stdout
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory, runtime):
    """A small classifier with names of all kinds, and its page."""
    run = save_classifier(tmp_path_factory.mktemp("runs") / "<i>shapes", CLASSES, 64, "pad")
    (run / "examples").mkdir()
    for number, name in enumerate(("cross", "a long name of a class that takes some room", "قطة")):
        photo(np.random.default_rng(number), 64, 64).save(run / f"examples/0{number}-{name}.png")
    return ImageClassifier.load(run, ResNet), export(run, run.parent / "page")


@contextmanager
def serving(folder):
    """The address of a folder, as `python -m http.server` serves it."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def photo(rng, width: int, height: int) -> Image.Image:
    """Soft shapes in all colors, with a little noise."""
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noise = rng.normal(0, 8, (height, width, 3))
    return Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))


def make_photos(folder):
    """Files of all formats that browsers read: colors, orientations, transparency, sizes and shapes."""
    rng = np.random.default_rng(0)
    make = functools.partial(photo, rng)
    exif = Image.Exif()

    def turned(orientation):
        exif[0x112] = orientation
        return exif.tobytes()

    mask = Image.radial_gradient("L").resize((300, 200))
    clear = make(300, 200)
    clear.putalpha(mask)
    gray = make(200, 260).convert("L")
    # A color profile that exchanges red and green.
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace(b"rXYZ", b"xXYZ", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"xXYZ", b"gXYZ", 1)
    frames = [make(120, 120).quantize(64) for _ in range(3)]
    return {
        name: (image.save(folder / name, **settings), folder / name)[1]
        for name, image, settings in (
            ("cifar.png", make(32, 32), {}),
            ("tiny.png", make(7, 5), {}),
            ("square.png", make(500, 500), {}),
            ("wide.png", make(900, 200), {}),
            ("tall.png", make(150, 1001), {}),
            ("gray.png", gray, {}),
            ("bits.png", gray.filter(ImageFilter.BoxBlur(9)).convert("1"), {}),
            ("palette.png", make(300, 300).quantize(100), {}),
            ("clear.png", clear, {}),
            ("clear-gray.png", Image.merge("LA", (clear.convert("L"), mask)), {}),
            ("clear-palette.png", make(100, 90).quantize(16), {"transparency": 3}),
            ("small.jpg", make(64, 48), {}),
            ("gray.jpg", gray, {"quality": 90}),
            ("fine.jpg", make(333, 251), {"quality": 95, "subsampling": 0, "progressive": True}),
            ("turned.jpg", make(400, 300), {"exif": turned(6)}),
            ("mirrored.jpg", make(200, 300), {"exif": turned(5), "quality": 90}),
            ("phone.jpg", make(4032, 3024), {"exif": turned(8)}),
            ("profile.jpg", make(240, 200), {"icc_profile": profile}),
            ("lossless.webp", clear, {"lossless": True}),
            ("photo.webp", make(300, 200), {}),
            ("photo.avif", make(300, 200), {}),
            ("photo.bmp", make(90, 120), {}),
            ("animated.gif", frames[0], {"save_all": True, "append_images": frames[1:], "duration": 100}),
        )
    }


def upload(chrome, file):
    """Choose a file; what the page says about it."""
    chrome.find_element(By.ID, "file").send_keys(str(file))
    chrome.execute_async_script("work.then(arguments[0])")
    return re.sub("[\u2068\u2069]", "", chrome.find_element(By.ID, "status").text)


@pytest.mark.slow
def test_images_of_all_formats(tmp_path, runtime):
    """As predict.py classifies them, within 1e-3."""
    page = export(ROOT / "results/cifar10-best", tmp_path / "page")
    assert (page / "model.onnx").stat().st_size < 14e6  # in half precision, like the weights
    files = make_photos(tmp_path)
    classifier = ImageClassifier.load(ROOT / "results/cifar10-best", ResNet)
    classifier.precision = "fp32"
    expected = classifier.predict(list(files.values()))
    with serving(page) as address, chromium() as chrome:
        chrome.set_script_timeout(600)
        chrome.get(address)
        chrome.execute_async_script("loading.then(arguments[0])")
        differences = {}
        for (name, file), row in zip(files.items(), expected):
            said = upload(chrome, file)
            assert f"The likeliest class of {name}: {classifier.names[row.argmax()]}, " in said
            found = torch.tensor(chrome.execute_script("return [...shown.probabilities]"))
            differences[name] = (found - row).abs().max().item()
        first = chrome.execute_script("return performance.getEntriesByName('classification')[0].duration")
        print(f"{first:.0f} ms;", ", ".join(f"{name} {difference:.0e}" for name, difference in differences.items()))
        assert len(differences) == 23 and max(differences.values()) < 1e-3, differences
        assert first < 20_000  # milliseconds; a tenth of it unless other programs keep the machine busy
        assert chrome.get_log("browser") == []
        assert {url.removeprefix(address) for url in requests(chrome)} - {"data:,"} == {
            "", "model.onnx", "runtime/ort.wasm.bundle.min.js", "runtime/ort-wasm-simd-threaded.wasm"
        }  # fmt: skip


@pytest.mark.slow
def test_pixels_are_those_of_pillow(small):
    """Each way to make an image square, enlarged and reduced, in strips: not a single value differs."""
    rng = np.random.default_rng(1)
    shapes = [(32, 32), (64, 64), (4, 4), (5, 9), (63, 64), (320, 240), (97, 1300), (700, 33), (1100, 1000)]
    shapes += [(4, 390), (1300, 5)]  # so long that a line of them is left
    settings = [(resize, size) for resize in RESIZE for size in (32, 72)]
    with serving(small[1]) as address, chromium() as chrome:
        chrome.set_script_timeout(600)
        chrome.get(address)
        for width, height in shapes:
            file = BytesIO()
            photo(rng, width, height).save(file, "PNG", compress_level=1)
            found = chrome.execute_async_script(
                """const [data, settings, done] = arguments;
                const blob = new Blob([Uint8Array.from(atob(data), (letter) => letter.charCodeAt())]);
                decode(blob).then((bitmap) => done(settings.map(([resize, size]) => {
                    Object.assign(about, { resize, size });
                    return [...toPixels(bitmap)];
                })));""",
                b64encode(file.getvalue()).decode(), settings,
            )  # fmt: skip
            for pixels, (resize, size) in zip(found, settings, strict=True):
                expected = decode_image(file.getvalue(), size=size, resize=resize)
                assert (np.reshape(pixels, expected.shape) == expected).all(), (width, height, resize, size)


@pytest.mark.slow
@pytest.mark.parametrize("width, dark", [(360, True), (1280, False)], ids=["phone in the dark", "screen"])
def test_with_eyes_keyboard_and_ears(small, tmp_path, width, dark):
    classifier, page = small
    with serving(page) as address, chromium() as chrome:
        set_screen(chrome, width, 1000, dark)
        chrome.set_script_timeout(600)
        press = lambda *keys: ActionChains(chrome).send_keys(*keys).perform()  # noqa: E731
        focused = lambda: chrome.switch_to.active_element  # noqa: E731
        fits = lambda: chrome.execute_script("return document.documentElement.scrollWidth <= innerWidth")  # noqa: E731
        chrome.get(address)
        chrome.execute_async_script("loading.then(arguments[0])")
        status = chrome.find_element(By.ID, "status")
        assert status.aria_role == "status" and status.text == "Ready: choose an image." and fits()
        # The keyboard: the file, the examples, an example, and with its result a class.
        press(Keys.TAB)
        assert focused().get_attribute("type") == "file" and focused().accessible_name == "Choose an image"
        assert chrome.find_element(By.CLASS_NAME, "button").value_of_css_property("outline-style") == "solid"
        while focused().tag_name != "button":
            press(Keys.TAB)
        assert focused().accessible_name == "cross"
        press(Keys.ENTER)
        WebDriverWait(chrome, 600).until(lambda _: "likeliest" in status.text)
        probabilities = classifier.predict(str(sorted((page / "examples").iterdir())[0]))[0]
        best = probabilities.topk(3)
        names = [classifier.names[k] for k in best.indices]
        said = f"The likeliest class of the example cross: {names[0]}, {best.values[0]:.1%}."
        assert re.sub("[\u2068\u2069]", "", status.text) == " ".join(said.split())
        choices = chrome.find_elements(By.CSS_SELECTOR, "#classes input")
        shown = [f"{' '.join(name.split())} {value:.1%}" for name, value in zip(names, best.values.tolist())]
        assert [choice.accessible_name for choice in choices] == shown
        while focused().get_attribute("name") != "class":
            press(Keys.SHIFT, Keys.TAB)
        for rank in (0, 1):
            pixels = torch.from_numpy(classifier.decode(page / "examples/0.png"))
            expected = classifier.grad_cam(pixels, best.indices[rank].item())[-1]
            k = chrome.execute_script("return document.querySelector('#classes :checked').value")
            heat = chrome.execute_script("return [...heatMap(shown.maps[arguments[0]], shown.height, shown.width)]", k)
            assert int(k) == best.indices[rank]
            torch.testing.assert_close(torch.tensor(heat).view(64, 64), expected, atol=1e-4, rtol=0)
            assert names[rank].split()[0] in chrome.find_element(By.ID, "evidence").accessible_name
            press(Keys.ARROW_DOWN)
        # All names as they are, within the page.
        topk = chrome.find_element(By.ID, "topk")
        topk.send_keys(Keys.ARROW_UP, Keys.ARROW_UP, Keys.TAB)
        listed = [name.text for name in chrome.find_elements(By.CSS_SELECTOR, "#classes bdi")]
        assert sorted(listed) == sorted(" ".join(name.split()) for name in CLASSES)
        assert fits() and chrome.find_element(By.TAG_NAME, "h1").text == "<i>shapes: which of 5 classes?"
        for part in chrome.find_elements(By.CSS_SELECTOR, "bdi, button, figcaption, .setting, legend, p"):
            assert chrome.execute_script("return arguments[0].scrollWidth <= arguments[0].offsetWidth", part), part.text
        named = chrome.find_elements(By.CSS_SELECTOR, "input, button, section, [role=img]")
        nameless = [part for part in named if part.is_displayed() and not part.accessible_name]
        assert [part.get_attribute("outerHTML") for part in nameless] == []
        for element in chrome.find_elements(By.CSS_SELECTOR, "h1, .soft, .button, bdi, footer"):
            assert contrast(chrome, element) >= 4.5, element.text
        body = chrome.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")
        assert (luminance(body) < 0.5) == dark
        # What is no image, or too small, is answered, and the page goes on.
        (tmp_path / "text.png").write_text("not an image")
        Image.new("RGB", (400, 3)).save(tmp_path / "line.png")
        assert "text.png can't be classified: it can't be read as an image" in upload(chrome, tmp_path / "text.png")
        assert "line.png can't be classified: it is too small, 400×3 pixels" in upload(chrome, tmp_path / "line.png")
        assert not chrome.find_element(By.ID, "result").is_displayed()
        assert "The likeliest class" in upload(chrome, page / "examples/1.png")
        for event in ("DragEvent('drop', { dataTransfer: data", "ClipboardEvent('paste', { clipboardData: data"):
            chrome.execute_async_script(
                f"""const [number, done] = arguments, data = new DataTransfer();
                fetch("examples/0.png").then((answer) => answer.blob()).then((blob) => {{
                    data.items.add(new File([blob], `image ${{number}}.png`, {{ type: "image/png" }}));
                    document.body.dispatchEvent(new {event}, bubbles: true, cancelable: true }}));
                    work.then(done);
                }});""",
                len(event),
            )
            assert f"image {len(event)}.png" in status.text and "likeliest class" in status.text
            torch.testing.assert_close(
                torch.tensor(chrome.execute_script("return [...shown.probabilities]")), probabilities, atol=1e-3, rtol=0
            )
        assert chrome.get_log("browser") == []


def luminance(color: str) -> float:
    """Of a CSS color, as the Web Content Accessibility Guidelines define it."""
    red, green, blue = (float(value) / 255 for value in re.findall(r"[\d.]+", color)[:3])
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in (red, green, blue)]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(chrome, element) -> float:
    """Between the text of an element and the page, and for a class also the bar of its probability: the lower one."""
    behind = chrome.find_elements(By.CSS_SELECTOR, "body, .bar" if element.tag_name == "bdi" else "body")
    colors = {part.value_of_css_property("background-color") for part in behind}
    text = luminance(element.value_of_css_property("color"))
    return min((max(text, other) + 0.05) / (min(text, other) + 0.05) for other in map(luminance, colors))


@pytest.mark.slow
def test_opened_as_a_file_it_says_how_to_open_it(small):
    with chromium() as chrome:
        chrome.get(f"file://{small[1]}/index.html")
        chrome.execute_async_script("loading.catch(arguments[0])")
        assert "python -m http.server" in chrome.find_element(By.ID, "status").text


# ---- The files


@pytest.fixture
def tiny_runtime(tmp_path, monkeypatch):
    """A stand-in of ONNX Runtime Web, and its checksums."""
    (tmp_path / "package/dist").mkdir(parents=True)
    sums = {}
    for name in webpage.RUNTIME:
        (tmp_path / "package/dist" / name).write_text(f"content of {name}")
        sums[name] = hashlib.sha256(f"content of {name}".encode()).hexdigest()
    monkeypatch.setattr(webpage, "RUNTIME", sums)
    return tmp_path / "package"


def test_names_of_any_kind_are_embedded_safely(tmp_path, tiny_runtime):
    classifier = ImageClassifier.load(save_classifier(tmp_path / "<script>x", CLASSES), ResNet)
    (tmp_path / "page").mkdir()
    webpage.write_page(tmp_path / "page", classifier, b"model", [], {}, webpage.read_runtime(str(tiny_runtime)))
    page = (tmp_path / "page/index.html").read_text()
    assert page.count("<script") == page.count("</script>") == 2 and "<title>&lt;script&gt;x: which of 5 " in page
    (about,) = re.findall('<script type="application/json" id="about">(.*?)</script>', page)
    assert json.loads(about) == dict(classes=[*CLASSES], size=32, resize="crop", examples=[])
    assert html.unescape(page).count(f"<bdi>{EVIL}</bdi>") == 1 and "Tested on" not in page
    elsewhere = r"""(?:src|href)=["'](?!data:,|LICENSE)|https?:(?!//localhost)|{{\w+}}"""
    assert not re.findall(elsewhere, page.replace(about, "").replace(html.escape(EVIL), ""))
    assert "6,574,090" not in page and f"{sum(p.numel() for p in classifier.model.parameters()):,} parameters" in page
    assert {file.name for file in (tmp_path / "page").rglob("*.*")} == {
        "index.html", "model.onnx", "LICENSE.txt", "ort.wasm.bundle.min.js", "ort-wasm-simd-threaded.wasm"
    }  # fmt: skip


def test_the_page_says_what_the_model_knows_and_how_well():
    names = [f"class {i}" for i in range(60)]
    said = webpage.introduce(names, dict(accuracy=0.7908, images=1530))
    assert said.startswith("The model knows these classes: <bdi>class 0</bdi>, <bdi>class 1</bdi>, ")
    assert "class 49</bdi> and 10 more. It always chooses one, whatever the image shows. " in said
    assert said.endswith(" Tested on 1,530 images that it was not trained on, it was right for 79.1%.")


@pytest.mark.parametrize("there", [True, False])
def test_an_interrupted_page_can_be_written_again(tmp_path, tiny_runtime, there):
    """Nothing of it is left, so that the folder is still a new or an empty one."""
    classifier = ImageClassifier.load(save_classifier(tmp_path / "run", CLASSES), ResNet)
    if there:
        (tmp_path / "page").mkdir()
    before = sorted(tmp_path.rglob("*"))
    runtime = webpage.read_runtime(str(tiny_runtime))
    with pytest.raises(TypeError):
        webpage.write_page(tmp_path / "page", classifier, "no bytes", [], {}, runtime)
    assert sorted(tmp_path.rglob("*")) == before
    webpage.write_page(tmp_path / "page", classifier, b"model", [], {}, runtime)
    assert (tmp_path / "page/model.onnx").read_bytes() == b"model"


def test_the_runtime_is_checked(tmp_path, tiny_runtime, monkeypatch):
    assert webpage.read_runtime(str(tiny_runtime)) == webpage.read_runtime(str(tiny_runtime / "dist"))
    with pytest.raises(
        UserError, match=r"nowhere holds no ort\S+ \(No such file.*\); pass --runtime with a copy of the npm"
    ):
        webpage.read_runtime(str(tmp_path / "nowhere"))
    # The package in the registry has other files, as those here have other checksums.
    archive = tmp_path / "package.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tiny_runtime, "package")
    monkeypatch.setattr(webpage, "PACKAGE", archive.as_uri())
    monkeypatch.setattr(webpage, "VERSION", "0.0.0-test")
    assert webpage.read_runtime() == webpage.read_runtime(str(tiny_runtime))
    archive.unlink()
    assert webpage.read_runtime() == webpage.read_runtime(str(tiny_runtime))  # it is kept
    wasm = tiny_runtime / "dist/ort-wasm-simd-threaded.wasm"
    wasm.write_text("something else")
    with pytest.raises(
        UserError, match=r"simd-threaded.wasm is not that of version 0.0.0-test \(its SHA-256 differs\)"
    ):
        webpage.read_runtime(str(tiny_runtime))
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tiny_runtime, "package")
    monkeypatch.setattr(webpage, "VERSION", "0.0.1-test")
    for message in ("its SHA-256 differs", "can't be downloaded"):
        with pytest.raises(UserError, match=rf"{message}.*; connect to the network, or pass --runtime"):
            webpage.read_runtime()
        archive.unlink(missing_ok=True)
