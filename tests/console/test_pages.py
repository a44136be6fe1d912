"""The pages in a real browser, over a real federation: what they show, that they live, that anybody can use them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.async_api import Dialog, Page, expect
from safetensors.numpy import load_file

from ..run_files import TINY_MODEL
from .conftest import AXE, DESK, PHONE, Looked
from .story import NASTY, WRONG, Story

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.xdist_group("console")]

RUN_FILE = f"""
name = "from the browser"
{TINY_MODEL}
[peft]
method = "bias"
[rounds]
count = 2
clients = 40
"""


def paths(story: Story) -> dict[str, str]:
    return {
        "overview": "/",
        "run": f"/runs/{story.live}",
        "paused run": f"/runs/{story.paused}",
        "round": f"/runs/{story.live}/rounds/5",
        "clients": "/clients",
        "client": f"/clients/{WRONG}",
        "audit": "/audit",
        "new run": "/new",
        "access": "/access",
        "nothing": "/nowhere",
    }


async def test_the_overview_says_what_goes_on(operator: Looked, story: Story) -> None:
    page = await operator.page()
    card = page.locator(f"#card-{story.live}")
    await expect(card).to_contain_text("running")
    await expect(card).to_contain_text("Waiting for openmoji, twemoji.")
    await expect(card).to_contain_text("Version 6 of 12")
    await expect(card).to_contain_text(re.compile(r"Outliers: .*fluent"))
    await expect(card).to_contain_text(re.compile(r"KiB up; full fine-tuning .* times as much"))
    await expect(card.locator("svg.spark polyline")).to_have_count(1)
    await expect(page.locator(f"#card-{story.paused}")).to_contain_text("waiting for the ethics board")


async def test_a_run_shows_its_round_its_curves_and_who_is_wrong(operator: Looked, story: Story) -> None:
    page = await operator.page(f"/runs/{story.live}")
    stage = page.get_by_role("region", name="Round 7")
    await expect(stage).to_contain_text("3 of 5 updates, quorum 3")
    await expect(stage.get_by_role("listitem").filter(has_text="Training")).to_have_attribute("aria-current", "step")
    await expect(stage.get_by_role("row")).to_have_count(6)
    await expect(page.locator("figure canvas")).to_have_count(5)
    await expect(page.locator("#said-accuracy")).to_contain_text("From 11.0 % (version 0) to 47.9 % (version 6)")
    await expect(page.locator("#said-norms")).to_contain_text(f"outliers: {WRONG}")
    await expect(page.locator(f"#member-{WRONG}")).to_contain_text("update norm 7.7 times the median in rounds 3, 6")
    await expect(page.locator("#member-openmoji")).to_contain_text("refused in round 5: PAYLOAD_INVALID")
    await expect(page.locator("#round-5")).to_contain_text("1 refused")


async def test_a_legend_shows_the_newest_values_before_anybody_points_at_the_chart(
    operator: Looked, story: Story
) -> None:
    page = await operator.page(f"/runs/{story.live}")
    legends = {
        name: page.locator(f'[data-chart="{name}"] .u-legend') for name in ("accuracy", "spent", "bytes", "loss")
    }
    await expect(legends["accuracy"]).to_contain_text(re.compile(r"Round:?\s*6\s*Accuracy:?\s*47\.9 %"))
    await expect(legends["spent"]).to_contain_text(re.compile(r"Sent:?\s*1\.\d+ MiB\s*Accuracy:?\s*47\.9 %"))
    await expect(legends["bytes"]).to_contain_text(re.compile(r"Up:?\s*103 KiB\s*Down:?\s*103 KiB"))
    await expect(legends["loss"]).to_contain_text(re.compile(r"Training:?\s*1\.14\s*Held out:?\s*1\.821"))
    over = page.locator('[data-chart="accuracy"] .u-over')
    await over.hover(position={"x": 2, "y": 40})
    await expect(legends["accuracy"]).to_contain_text(re.compile(r"Round:?\s*0\s*Accuracy:?\s*11\.0 %"))
    await page.mouse.move(0, 0)
    await expect(legends["accuracy"]).to_contain_text("47.9 %")


async def test_the_configuration_of_a_run_stands_on_its_page_and_may_be_begun_with(
    operator: Looked, story: Story
) -> None:
    page = await operator.page(f"/runs/{story.live}")
    await page.get_by_text("Run file with all defaults").click()
    text = page.get_by_label("The run file of emoji")
    await expect(text).to_contain_text('name = "vit_tiny_patch16_224"')
    await expect(text).to_contain_text("quorum = 3")
    shown = await text.inner_text()
    await page.get_by_role("link", name="New run from this configuration").click()
    field = page.get_by_label("Run file (TOML)")
    assert (await field.input_value()).strip() == shown.strip()
    await page.get_by_role("button", name="Check").click()
    await expect(page.get_by_text("Valid: bias on vit_tiny_patch16_224, 12 rounds of 5 clients")).to_be_visible()


async def test_a_new_run_begins_empty_or_with_an_example(operator: Looked) -> None:
    page = await operator.page("/new")
    field = page.get_by_label("Run file (TOML)")
    assert await field.input_value() == ""
    await page.get_by_role("link", name="LoRA on ViT-B/16").click()
    await expect(field).to_have_value(re.compile(r'method = "lora"'))
    await expect(page.get_by_role("link", name="LoRA on ViT-B/16")).to_have_attribute("aria-current", "page")
    await page.get_by_role("button", name="Check").click()
    await expect(page.get_by_text("Valid: lora on vit_base_patch16_224")).to_be_visible()
    for wrong in ("example=nothing", "run=run-000000000000", "run=../x"):
        answer = await page.request.get(f"{operator.base}/new?{wrong}")
        assert answer.status == 404, wrong


async def test_stop_is_not_beside_pause(operator: Looked, story: Story) -> None:
    page = await operator.page(f"/runs/{story.live}")
    await page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    await expect(page.locator("#head").get_by_role("button")).to_have_text(["Pause"])
    names = ("Pause", "Roll back", "Stop")
    boxes = [await page.get_by_role("button", name=name, exact=True).bounding_box() for name in names]
    assert boxes[0] and boxes[1] and boxes[2]
    assert all(abs(boxes[0]["y"] - (box or {})["y"]) > PHONE["height"] for box in boxes[1:])


async def test_rounds_are_a_compact_list_on_a_phone(operator: Looked, story: Story) -> None:
    page = await operator.page(f"/runs/{story.live}")
    await page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    heights = [(await row.bounding_box() or {})["height"] for row in await page.locator("#rounds tbody tr").all()]
    assert len(heights) == 7 and sorted(heights)[4] < 45, "a line each"
    assert max(heights) < 80, "and a second one for what was not counted in rounds 4 and 5"
    await expect(page.locator("#round-5")).to_contain_text("1 refused")
    await expect(page.locator("#round-5 td[data-label=Seconds]")).to_be_hidden()
    await page.locator("#round-5 th a").click()  # what the line leaves out stands there
    await expect(page.get_by_role("link", name="Download version 5")).to_be_visible()


async def test_a_run_lives_without_a_reload(operator: Looked, story: Story) -> None:
    federation = story.federation
    sites = ("alive-1", "alive-2", "alive-3")
    federation.join(*sites)
    run = federation.create("alive", 2, 3)
    page = await operator.page(f"/runs/{run}")
    await page.evaluate("window.untouched = true")
    federation.play(sites, 1)
    await expect(page.locator("#round-1")).to_contain_text("version 1")
    federation.score("evaluator", run, 1)
    await expect(page.locator("#round-1")).to_contain_text("21.0 %")
    federation.play(sites, 2)
    await expect(page.locator("#head .badge")).to_have_text("completed")
    federation.score("evaluator", run, 2)
    await expect(page.locator("#round-2")).to_contain_text("29.0 %")
    assert await page.evaluate("window.untouched")
    assert await coloured(page) > 100


async def coloured(page: Page) -> int:
    """Returns how many pixels of the first chart are neither grey nor white."""
    return int(
        await page.evaluate(
            """() => {
                const canvas = document.querySelector("figure canvas");
                const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
                let count = 0;
                for (let at = 0; at < pixels.length; at += 4) {
                    const rgb = pixels.slice(at, at + 3);
                    count += pixels[at + 3] > 0 && Math.max(...rgb) - Math.min(...rgb) > 60;
                }
                return count;
            }"""
        )
    )


async def test_what_a_client_says_is_never_html(operator: Looked, story: Story) -> None:
    dialogs: list[Dialog] = []
    page = await operator.page(f"/runs/{story.live}/rounds/4")
    page.on("dialog", lambda dialog: dialogs.append(dialog))
    await expect(page.get_by_role("row").filter(has_text="noto")).to_contain_text(NASTY)
    assert await page.locator("main script, main img").count() == 0
    await page.goto(f"{operator.base}/clients/noto")
    await expect(page.locator("#history")).to_contain_text(NASTY)
    assert dialogs == []


async def test_a_client_has_its_history(operator: Looked, story: Story) -> None:
    page = await operator.page("/clients")
    await page.get_by_role("link", name=WRONG).click()
    await expect(page.locator("#about")).to_contain_text("617 examples")
    await expect(page.locator("#about")).to_contain_text("update norm 7.7 times the median")
    await expect(page.locator("#history tr.odd")).to_have_count(2)
    await expect(page.locator("figure canvas")).to_have_count(1)


async def test_the_audit_log_says_who_did_what(operator: Looked, story: Story) -> None:
    page = await operator.page("/audit")
    await expect(page.get_by_role("row").filter(has_text="run.created").filter(has_text=story.live)).to_have_count(1)
    newest = int(await page.locator("tbody th").first.inner_text())
    assert newest > 50
    await page.get_by_role("link", name="Older").click()
    await expect(page.locator("tbody th").first).to_have_text(str(newest - 50))
    await page.get_by_role("link", name="Newer").click()
    await expect(page.locator("tbody th").first).to_have_text(re.compile(r"\d+"))


async def test_a_version_is_downloaded(operator: Looked, story: Story, tmp_path: Path) -> None:
    page = await operator.page(f"/runs/{story.live}")
    async with page.expect_download() as waiting:
        await page.get_by_role("link", name="version 6 as safetensors").click()
    download = await waiting.value
    assert download.suggested_filename == f"{story.live}-version-6.safetensors"
    await download.save_as(tmp_path / "adapter.safetensors")
    assert load_file(tmp_path / "adapter.safetensors")["head.weight"].shape == (9, 500)


async def test_an_operator_creates_pauses_resumes_and_stops(operator: Looked, story: Story) -> None:
    page = await operator.page("/new")
    await page.get_by_label("Run file (TOML)").fill(RUN_FILE.replace("count = 2", "count = 0"))
    await page.get_by_role("button", name="Check").click()
    await expect(page.get_by_role("alert").filter(has_text="error")).to_contain_text("Line 12 rounds.count")
    await page.get_by_label("Run file (TOML)").fill(RUN_FILE)
    await page.get_by_role("button", name="Check").click()
    await expect(page.get_by_text("Valid: bias on vit_tiny_patch16_224, 2 rounds of 40 clients")).to_be_visible()
    await page.get_by_role("button", name="Create the run").click(timeout=120_000)
    await expect(page).to_have_url(re.compile(r"/runs/run-"), timeout=120_000)
    await expect(page.get_by_role("heading", name="from the browser", level=1)).to_be_visible()
    await page.get_by_role("button", name="Pause", exact=True).click()
    await page.locator("dialog[open] input[name=reason]").fill("a look at the data")
    await page.get_by_role("button", name="Pause from the browser").click()
    await expect(page.locator("#head .badge")).to_have_text("paused")
    await expect(page.locator("#stage")).to_contain_text("a look at the data")
    await page.get_by_role("button", name="Resume", exact=True).click()
    await page.get_by_role("button", name="Resume from the browser").click()
    await expect(page.locator("#head .badge")).to_have_text("running")
    await page.get_by_role("button", name="Stop", exact=True).click()
    await page.get_by_role("button", name="Cancel").click()
    await expect(page.locator("#head .badge")).to_have_text("running")
    await page.get_by_role("button", name="Stop", exact=True).click()
    await page.get_by_role("button", name="Stop from the browser").click()
    await expect(page.locator("#head .badge")).to_have_text("stopped")
    await expect(page.get_by_role("button", name="Stop", exact=True)).to_have_count(0)


async def test_a_viewer_sees_all_and_steers_nothing(viewer: Looked, story: Story) -> None:
    page = await viewer.page(f"/runs/{story.live}")
    await expect(page.get_by_role("region", name="Round 7")).to_be_visible()
    await expect(page.get_by_role("button", name="Pause")).to_have_count(0)
    await expect(page.get_by_role("link", name="New run")).to_have_count(0)
    token = await page.evaluate("fetch('/access').then((answer) => answer.text())")
    token = re.search(r'name="csrf" value="([^"]+)"', token)[1]  # type: ignore[index]
    for path in (f"/runs/{story.live}/stop", "/new"):
        answer = await page.request.post(viewer.base + path, form={"csrf": token}, headers={"Origin": viewer.base})
        assert answer.status == 403
        assert "This session is read-only" in await answer.text()


async def test_whoever_logs_out_is_told_on_every_page(viewer: Looked) -> None:
    page, other = await viewer.page("/clients"), await viewer.page("/access")
    await other.get_by_role("button", name="Log out").click()
    await expect(page.get_by_role("heading", name="Not logged in")).to_be_visible()


async def test_by_keyboard_alone(operator: Looked, story: Story) -> None:
    federation = story.federation
    run = federation.create("by keyboard", 2, 40)
    page = await operator.page()
    await page.keyboard.press("Tab")
    await expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    await page.keyboard.press("Enter")
    link = page.locator(f"#card-{run} a")
    for _ in range(10):
        await page.keyboard.press("Tab")
        if await link.evaluate("(link) => link === document.activeElement"):
            break
    await page.keyboard.press("Enter")
    await expect(page).to_have_url(f"{operator.base}/runs/{run}")
    pause = page.get_by_role("button", name="Pause", exact=True)
    for _ in range(12):
        await page.keyboard.press("Tab")
        if await pause.evaluate("(button) => button === document.activeElement"):
            break
    await page.keyboard.press("Enter")
    await expect(page.locator("dialog[open] input[name=reason]")).to_be_focused()
    await page.keyboard.type("lunch")
    await page.keyboard.press("Enter")
    await expect(page.locator("#head .badge")).to_have_text("paused")
    federation.ask(lambda server: server.stop(run))


async def test_focus_stays_where_it_is_while_the_page_changes(operator: Looked, story: Story) -> None:
    federation = story.federation
    sites = ("steady-1", "steady-2")
    federation.join(*sites)
    run = federation.create("steady", 2, 2)
    page = await operator.page(f"/runs/{run}")
    federation.play(sites, 1)
    link = page.get_by_role("link", name="version 1 as safetensors")
    await link.focus()
    federation.play(sites, 2)
    await expect(page.locator("#round-2")).to_be_visible()
    await expect(link).to_be_focused()


async def test_nothing_is_in_the_way_of_anybody(operator: Looked, story: Story) -> None:
    page = await operator.page("/new")
    await page.get_by_label("Run file (TOML)").fill(RUN_FILE.replace("count = 2", "count = 0"))
    await page.get_by_role("button", name="Check").click()
    await expect(page.get_by_role("heading", name="1 error")).to_be_visible()
    found = {"faults": await violations(page)}
    for name, path in paths(story).items():
        await page.goto(operator.base + path)
        found[name] = await violations(page)
    await page.goto(f"{operator.base}/runs/{story.live}")
    await page.get_by_role("button", name="Stop", exact=True).click()
    found["dialog"] = await violations(page)
    assert found == {name: [] for name in found}


async def violations(page: Page) -> list[str]:
    """Returns what axe-core finds in either theme, a line each."""
    await page.evaluate(AXE.read_text())
    lines = []
    for scheme in ("light", "dark"):
        await page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        result = await page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        lines += [f"{scheme} {v['id']}: {n['html'][:120]}" for v in result["violations"] for n in v["nodes"]]
    return lines


async def test_a_phone_needs_no_sideways_scrolling(operator: Looked, story: Story) -> None:
    page = await operator.page()
    await page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    for name, path in paths(story).items():
        await page.goto(operator.base + path)
        width = await page.evaluate("document.documentElement.scrollWidth")
        assert width <= PHONE["width"], name


async def test_a_theme_is_chosen_and_kept(operator: Looked) -> None:
    page = await operator.page()
    assert DESK["width"] == (page.viewport_size or {}).get("width")
    light = await page.evaluate("getComputedStyle(document.body).backgroundColor")
    await page.get_by_label("Theme").select_option("dark")
    dark = await page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert dark != light
    await page.reload()
    assert await page.evaluate("getComputedStyle(document.body).backgroundColor") == dark
    await page.get_by_label("Theme").select_option("system")
