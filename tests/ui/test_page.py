"""Clicks and types through the page in headless Chromium, and takes the pictures of it that docs/results holds.

`make test-page`; the run that is looked at is trained into runs/page once.
"""

import io
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, rank_environment
from PIL import Image

playwright = pytest.importorskip("playwright.sync_api", reason="needs a browser's driver: pip install -e '.[page]'")
expect = playwright.expect

RUN, RESULTS = ROOT / "runs" / "page", ROOT / "docs" / "results"


def command(module: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"eae_dist.{module}", *arguments], cwd=ROOT, env=rank_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


@contextmanager
def service(*arguments: str):
    """The address of a service of the run."""
    line = [sys.executable, "-m", "eae_dist.serve", "--ckpt", str(RUN), "--port", "0", *arguments]
    with subprocess.Popen(line, cwd=ROOT, env=rank_environment(), stderr=subprocess.PIPE, text=True) as process:
        try:
            yield next(match[1] for line in process.stderr if (match := re.search(r"at (http://\S+) ", line)))
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)


@pytest.fixture(scope="module")
def address():
    settings = ("train.epochs=8", f"train.output={RUN}", "train.device=cpu")
    command("train", *settings)
    if not (RUN / "evaluation" / "densities" / "gmm.safetensors").is_file():
        command("evaluate", "--ckpt", str(RUN), "evaluate.count=100", "evaluate.densities=[mvg,gmm]")
    command("encode", "--ckpt", str(RUN), "--out", str(RUN / "latents"))
    with service("--latents", str(RUN / "latents")) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        installed = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        if installed is None and not Path(driver.chromium.executable_path).exists():
            pytest.skip("there is no Chromium: apt-get install chromium, or playwright install chromium")
        found = driver.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        yield found
        found.close()


@contextmanager
def opened(browser, address: str, *, width=1280, height=960, scheme="light", samples=True):
    """The page, with nothing said in its console and nothing asked of other hosts."""
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme, reduced_motion="reduce")
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    if samples:
        expect(page.locator("#samples .tile")).to_have_count(48)
        expect(page.locator("#strip img")).to_have_count(11)
    yield page
    assert not said and all(url.startswith((address, "data:")) for url in asked)
    page.close()


def source(page, selector: str) -> str:
    return page.locator(selector).get_attribute("src")


def test_selected_image_is_shown_with_reconstruction_and_neighbors(browser, address):
    with opened(browser, address) as page:
        page.locator("#samples .tile").nth(4).click()
        expect(page.locator("#neighbors .tile")).to_have_count(10)
        expect(page.locator("#caption")).to_have_text("sample 4 of isotropic, seed 0")
        assert source(page, "#reconstruction") != source(page, "#original") == source(page, "#samples .tile:nth-child(5) img")
        # A neighbor is an image like any other, and not its own neighbor.
        page.locator("#neighbors .tile").first.click()
        expect(page.locator("#caption")).to_have_text(re.compile(r"digit-\d+, class \d"))
        expect(page.locator("#selected")).not_to_have_class("waiting")
        key = page.locator("#caption").inner_text().split(",")[0]
        assert key not in "".join(page.locator("#neighbors img").evaluate_all("all => all.map((one) => one.src)"))
        page.locator("#images .tile").nth(2).click()
        expect(page.locator("#images .tile").nth(2)).to_have_attribute("aria-pressed", "true")


def test_samples_follow_density_and_seed(browser, address):
    with opened(browser, address) as page:
        first, image = source(page, "#samples .tile:nth-child(1) img"), page.locator("#samples .tile:nth-child(1) img")
        page.get_by_label("gmm").check()
        expect(image).not_to_have_attribute("src", first)
        second = image.get_attribute("src")
        page.get_by_role("button", name="Next seed").click()
        expect(image).not_to_have_attribute("src", second)
        expect(page.locator("#seed")).to_have_value("1")
        page.get_by_label("isotropic").check()
        page.locator("#seed").fill("0")
        page.locator("#seed").press("Enter")
        expect(image).to_have_attribute("src", first)
        expect(page.get_by_label("two_stage")).to_be_disabled()


def test_uploaded_images_are_cut_to_size(browser, address, tmp_path):
    wide = np.zeros((90, 200, 3), np.uint8)
    wide[:, 55:145] = 255  # the central square
    Image.fromarray(wide).save(tmp_path / "wide.png")
    (tmp_path / "no.png").write_text("no image")
    with opened(browser, address) as page:
        page.locator("#file").set_input_files(tmp_path / "wide.png")
        expect(page.locator("#caption")).to_have_text("wide.png")
        expect(page.locator("#neighbors .tile")).to_have_count(10)
        shown = page.locator("#uploads img").evaluate("image => [image.naturalWidth, image.naturalHeight]")
        darkest = page.locator("#uploads img").evaluate(
            """image => {
              const pen = document.createElement("canvas").getContext("2d");
              pen.drawImage(image, 0, 0);
              return Math.min(...pen.getImageData(0, 0, 32, 32).data);
            }"""
        )
        assert shown == [32, 32] and darkest > 230
        page.locator("#file").set_input_files(tmp_path / "no.png")
        expect(page.locator("#own .status")).to_have_text("no.png is not an image that this browser reads")


def test_keyboard_reaches_and_moves_everything(browser, address):
    with opened(browser, address) as page:
        focused = "document.activeElement.id || document.activeElement.className"
        stops = []
        for _ in range(40):
            page.keyboard.press("Tab")
            stop = page.evaluate(focused)
            visible = page.evaluate(
                """() => {
                  const one = document.activeElement, seen = (it) => it && getComputedStyle(it).outlineStyle !== "none";
                  if (one === document.body || one.matches(".skip")) return true;
                  return [one, one.nextElementSibling, one.parentElement].some(seen);
                }"""
            )
            assert visible, stop
            stops.append(stop)
            if stop == "tile" and page.evaluate("document.activeElement.closest('#samples') !== null"):
                page.keyboard.press("ArrowRight")
                page.keyboard.press("ArrowDown")
                page.keyboard.press("Enter")
        expect(page.locator("#caption")).to_have_text(re.compile(r"sample \d+ of"))
        assert {"theme", "seed", "next", "file", "as-start", "as-end", "start", "middle", "end", "slider", "step", "play"} <= {
            *stops
        }
        assert page.locator("#samples .tile[aria-pressed=true]").count() == 1


def test_slider_walks_from_start_to_end(browser, address):
    with opened(browser, address) as page:
        page.locator("#samples .tile").nth(1).click()
        page.get_by_role("button", name="Use as start").click()
        page.locator("#images .tile").nth(3).click()
        page.get_by_role("button", name="Use as end").click()
        assert source(page, "#end img").startswith("image?key=")
        page.locator("#slider").focus()
        page.keyboard.press("Home")
        expect(page.locator("#where")).to_have_text("0 %")
        expect(page.locator("#middle img")).to_have_attribute("src", source(page, "#start img"))
        page.keyboard.press("ArrowRight")
        expect(page.locator("#where")).to_have_text("3 %")
        page.keyboard.press("End")
        expect(page.locator("#slider")).to_have_attribute("aria-valuetext", "100 % from start to end")
        page.locator("#middle").click()
        expect(page.locator("#caption")).to_have_text("100 % from start to end")


def test_curves_and_pictures_of_the_run(browser, address):
    with opened(browser, address) as page:
        loss = page.locator("#curves figure").first
        expect(loss).to_have_attribute("aria-label", re.compile("^Loss: training .*, validation "))
        loss.focus()
        page.keyboard.press("Home")
        expect(loss.locator("figcaption")).to_contain_text("at 1.28 k")
        page.keyboard.press("ArrowRight")
        expect(page.locator("#curves figure").nth(1).locator("figcaption")).to_contain_text("at 2.56 k")
        page.locator("#step").focus()
        page.keyboard.press("Home")
        expect(page.locator("#picture-samples")).to_have_attribute("src", "grids/samples/28")
        page.get_by_role("button", name="Play").click()
        page.get_by_role("button", name="Pause").click()
        page.get_by_role("button", name="Play").click()
        expect(page.locator("#at")).to_have_text("219")  # the last one, where it ends
        expect(page.locator("#play")).to_have_text("Play")


def test_colors_are_kept_and_narrow_screens_fit(browser, address):
    with opened(browser, address, scheme="dark") as page:
        ground = "getComputedStyle(document.body).backgroundColor"
        assert page.evaluate(ground) == "rgb(19, 21, 23)"
        page.locator("#theme").click()
        assert page.evaluate(ground) == "rgb(250, 249, 246)"
        page.reload()
        expect(page.locator("#samples .tile")).to_have_count(48)
        expect(page.locator("#strip img")).to_have_count(11)
        assert page.evaluate(ground) == "rgb(250, 249, 246)"
    with opened(browser, address, width=360, height=740) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        page.locator("#samples .tile").first.click()
        expect(page.locator("#reconstruction")).to_be_in_viewport()


def test_page_without_an_index_and_after_the_service(browser, address):
    with service() as alone:
        with opened(browser, alone) as page:
            expect(page.locator("#data")).to_be_hidden()
            page.locator("#samples .tile").first.click()
            expect(page.locator("#error")).to_contain_text("squared error")
            expect(page.locator("#near")).to_be_hidden()
        left = browser.new_page()
        left.goto(alone)
        expect(left.locator("#strip img")).to_have_count(11)
    left.get_by_role("button", name="Next seed").click()
    expect(left.locator("section:has(#samples) .status")).to_have_text("the service does not answer")
    left.close()


def test_pictures_for_the_documentation(browser, address):
    with opened(browser, address) as page:
        page.locator("#images .tile").nth(4).click()
        page.get_by_role("button", name="Use as end").click()
        page.locator("#samples .tile").nth(5).click()
        expect(page.locator("#neighbors .tile")).to_have_count(10)
        page.get_by_role("button", name="Use as start").click()
        expect(page.locator("#start img")).to_have_attribute("alt", re.compile("sample 5"))
        keep(page, "serve-page.png", "header", "#between")
    with opened(browser, address, scheme="dark") as page:
        page.locator("#curves figure").first.focus()
        page.keyboard.press("End")
        page.keyboard.press("ArrowLeft")
        keep(page, "serve-training.png", "#training", "#training")


def keep(page, name: str, first: str, last: str) -> None:
    """From one element of the page to another, into docs/results."""
    page.evaluate("scrollTo(0, 0)")
    page.mouse.move(0, 0)
    page.evaluate("Promise.all([...document.images].filter((image) => image.src).map((image) => image.decode().catch(() => 0)))")
    page.wait_for_load_state("networkidle")
    top, bottom = (page.locator(selector).bounding_box() for selector in (first, last))
    y = max(top["y"] - 20, 0)
    clip = {"x": 0, "y": y, "width": page.viewport_size["width"], "height": bottom["y"] + bottom["height"] + 20 - y}
    Image.open(io.BytesIO(page.screenshot(full_page=True, clip=clip))).convert("RGB").save(RESULTS / name, optimize=True)
