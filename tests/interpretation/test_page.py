"""report.html in a real browser: everything in one file, readable on a phone and on a screen, in light and dark."""

import re
import shutil

import pytest
from browser import chromium, requests, set_screen
from commandline import command
from conftest import make_images
from selenium.webdriver.common.by import By

EVIL = "<script>alert(1)</script>".replace("/", "∕")  # a slash can't be in a folder's name


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report of a run with class names that must be escaped."""
    cwd = tmp_path_factory.mktemp("cwd")
    folder = make_images(cwd / "images", classes=("ring", f'{EVIL}"&', "a long name of a class " * 3))
    short = ("--epochs", 1, "--peak_epoch", 0.5, "--batch_size", 8, "--width", 4, "--name", "run")
    done = command("train.py", "--data", folder, *short, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd / "runs/run"


@pytest.fixture(scope="module")
def chrome():
    with chromium() as chrome:
        yield chrome


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_in_a_browser(report, chrome, width, dark):
    set_screen(chrome, width, 1000, dark)
    chrome.get(f"file://{report}/report.html")
    assert chrome.get_log("browser") == []  # no errors, no warnings
    assert [url for url in requests(chrome) if not url.startswith(("file:", "data:"))] == []
    images = chrome.find_elements(By.TAG_NAME, "img")
    assert len(images) == 6 and all(image.get_property("naturalWidth") > 300 for image in images)
    assert all(image.get_attribute("alt") for image in images)
    assert chrome.execute_script("return document.documentElement.scrollWidth") <= width
    background, color = (
        sum(map(int, re.findall(r"\d+", chrome.find_element(By.TAG_NAME, "body").value_of_css_property(name))[:3]))
        for name in ("background-color", "color")
    )
    assert (background < color) == dark and abs(background - color) > 400
    assert EVIL in chrome.find_element(By.TAG_NAME, "main").text  # as text, not as a script
    cells = [cell.text for cell in chrome.find_elements(By.TAG_NAME, "td")]
    assert any(cell.startswith("python train.py --data") for cell in cells)


@pytest.mark.slow
def test_it_holds_no_address(report):
    page = (report / "report.html").read_text()
    text = re.sub(r"data:image/png;base64,[\w+/=]+", "", page)  # whose letters may be any word
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", page) and "http" not in text and len(text) < len(page) / 10
    assert "<script" not in page


@pytest.mark.slow
def test_interpret_renews_it_and_writes_one_for_other_images(report, tmp_path):
    shutil.copytree(report, tmp_path / "run")
    (tmp_path / "run/report.html").unlink()
    assert command("interpret.py", tmp_path / "run", cwd=tmp_path, drawn=False).returncode == 0
    own = (tmp_path / "run/report.html").read_text()
    assert "Wilson" in own and own.count("<img") == 6 and "images per second" in own
    other = make_images(tmp_path / "other", train=5, test=3, classes=("ring", f'{EVIL}"&'))
    done = command("interpret.py", tmp_path / "run", "--data", other, "--tta", cwd=tmp_path, drawn=False)
    assert done.returncode == 0, done.stderr
    assert "of 6 test images of other correct" in done.stdout and "with test-time augmentation" in done.stdout
    assert (tmp_path / "run/other-test/report.html").read_text().count("<img") == 4  # without the training
    every = ("--data", other, "--split", "all", "--out", "there")
    done = command("interpret.py", tmp_path / "run", *every, cwd=tmp_path, drawn=False)
    assert done.returncode == 0 and "of 16 images of other (all) correct" in done.stdout
    (tmp_path / "mine/examples").mkdir(parents=True)
    (tmp_path / "mine/examples/holiday.png").write_text("of the user")
    its_own = ("--split", "train", "--out", "mine")
    done = command("interpret.py", tmp_path / "run", *its_own, cwd=tmp_path, drawn=False)
    assert done.returncode == 0, done.stderr
    assert "of 72 images of images (train, mostly trained on) correct" in done.stdout
    assert (tmp_path / "mine/examples/holiday.png").read_text() == "of the user"
    assert (tmp_path / "run/report.html").read_text() == own
    done = command("interpret.py", tmp_path / "run", "--data", other, "--split", "valid", cwd=tmp_path)
    assert done.returncode == 2 and "has no valid split; it has train, test; or use all" in done.stderr
    unknown = make_images(tmp_path / "unknown", train=5, test=3, classes=("ring", "star"))
    done = command("interpret.py", tmp_path / "run", "--data", unknown, cwd=tmp_path)
    assert done.returncode == 2 and "has classes that the model does not know: star; it knows" in done.stderr
