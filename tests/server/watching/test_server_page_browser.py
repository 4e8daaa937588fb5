"""The page in a real browser, against a live server that is at work."""

import json
import re
import threading

import pytest
from bundled import never_ending, text
from mlx_hybridcache_bench.kit.chromium import missing
from servers import CHAT, COMPLETIONS, INSTANT, OURS, running, user
from serving import browser

if why := missing():
    pytest.skip(f"the page is not tested: {why}", allow_module_level=True)

PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
TO = " \N{EN DASH} "
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser.chromium(tmp_path_factory.mktemp("browser")) as each:
        yield each


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server that has served some conversations, with text."""
    folder = str(tmp_path_factory.mktemp("cache"))
    flags = ("--cache-dir", folder, "--cache-ram", "64", "--show-prompts", "--draft-from-cache")
    with running(OURS, *flags) as server:
        yield busy(server)


def busy(server):
    """What a day of work leaves behind, small: documents, a shared system prompt, a changed date."""
    for k in range(3):
        server.answer(COMPLETIONS, prompt=f"{text(700)} Question {k}: what is it?", max_tokens=4)
    for day in ("2026-11-25", "2026-11-26"):
        system = {"role": "system", "content": f"Today is {day}. {text(300, 4000)}"}
        for k in range(2):
            asked = [system, *user(f"Tell me about item {k}.")]
            server.answer(CHAT, messages=asked, max_tokens=8, **INSTANT)
    server.answer(COMPLETIONS, prompt=text(150, 6000), max_tokens=2, cache_salt="s")
    for k in range(6):
        server.answer(COMPLETIONS, prompt=text(60 + 20 * k, 7000 + 200 * k), max_tokens=2)
    return server


def is_live(visit):
    visit.until("document.querySelector('#state').dataset.state === 'live'")
    visit.page.wait_for_selector("#main:not([hidden])")


def equals_what_the_server_says(visit, server):
    """Every figure on the page is the one of /v1/cache."""
    told = server.client.get("/v1/cache").json()
    requests = told["requests"]
    visit.until(
        "asked => document.querySelector('#prompt-tokens').value === String(asked)",
        requests["prompt_tokens"],
    )
    share = requests["restored_tokens"] / requests["prompt_tokens"]
    assert visit.value("hit-rate") == pytest.approx(share)
    expected = {
        "restored-tokens": requests["restored_tokens"],
        "prompt-tokens": requests["prompt_tokens"],
        "prompts": requests["prompts"],
        "held": told["held_bytes"],
        "budget": told["budget_bytes"],
        "disk-held": told["disk"]["held_bytes"],
        "disk-budget": told["disk"]["budget_bytes"],
    }
    for name, value in expected.items():
        visit.until(f"value => document.querySelector('#{name}').value === String(value)", value)
    noted = visit.page.locator("#tree-note").text_content()
    assert noted.startswith(f"{told['conversations']:,} conversations and {told['checkpoints']:,}")
    newest = server.client.get("/v1/cache/recent").json()["data"][0]
    first = visit.page.locator("#recent > li").first
    assert first.get_attribute("data-id") == newest["id"]
    assert first.locator(".reason").text_content() == newest["reason"]


def test_numbers_are_those_of_the_server_while_it_works_and_afterwards(chromium, server):
    """Four clients ask while the page watches: it goes on telling, and ends with /v1/cache's numbers."""
    stop = threading.Event()

    def client(number):
        k = 0
        while not stop.is_set():
            prompt = text(40, 9000 + 500 * number + 20 * (k % 20))
            server.answer(COMPLETIONS, prompt=prompt, max_tokens=4)
            k += 1

    clients = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    with chromium.visit(server.url) as visit:
        is_live(visit)
        for each in clients:
            each.start()
        try:
            before = visit.value("prompts")
            visit.until("document.querySelector('#main').dataset.updates >= 3")
            visit.until("before => document.querySelector('#prompts').value > before", before)
        finally:
            stop.set()
            for each in clients:
                each.join()
        equals_what_the_server_says(visit, server)
        assert visit.page.locator("#chart svg .column").count() > 10


def test_what_runs_is_seen_while_it_runs(chromium, server):
    """A reply of 700 tokens appears under "Running now" and goes away when it has ended."""
    body = {"prompt": text(50, 15_000), "max_tokens": 700, "logit_bias": never_ending()}
    with chromium.visit(server.url) as visit:
        is_live(visit)
        asking = threading.Thread(target=server.answer, args=(COMPLETIONS,), kwargs=body)
        asking.start()
        visit.page.wait_for_selector("#now:not([hidden]) li")
        asking.join()
        visit.page.wait_for_selector("#now", state="hidden")


def test_the_tree_unfolds_with_the_mouse_and_with_the_keyboard(chromium, server):
    """Three questions about one document: its run unfolds to three, an arrow goes to the first, another
    one closes it again.
    """
    with chromium.visit(server.url) as visit:
        is_live(visit)
        visit.page.select_option("#order", "size")
        rows = visit.page.locator("#tree .top > li")
        trunk = rows.filter(has_text=" ".join(text(700)[:24].split())).first
        trunk.locator("> .row .bar b").first.wait_for(state="attached")  # it may just be drawn anew
        assert trunk.locator("> .row .places").text_content() == "3 conversations"
        trunk.locator("> .row .fold").click()
        below = trunk.locator("> .more > ul > li")
        visit.until("document.querySelectorAll('#tree ul ul li').length >= 2")
        assert trunk.locator("> .more table tbody tr").count() > 0
        shared = trunk.locator("> .row .range").text_content().split(TO)[1]
        starts = {row.split(TO)[0] for row in below.locator("> .row .range").all_text_contents()}
        assert starts == {shared}
        focused = "document.activeElement.closest('li').dataset.key"
        visit.page.keyboard.press("ArrowRight")
        assert visit.page.evaluate(focused) == below.first.get_attribute("data-key")
        visit.page.keyboard.press("ArrowLeft")
        assert visit.page.evaluate(focused) == trunk.get_attribute("data-key")
        visit.page.keyboard.press("ArrowLeft")
        assert trunk.locator("> .row .fold").get_attribute("aria-expanded") == "false"
        visit.until("document.querySelectorAll('#tree ul ul li').length === 0")
        visit.page.keyboard.press("Enter")
        visit.until("document.querySelectorAll('#tree ul ul li').length >= 2")


def test_pin_unpin_and_drop_do_what_they_say(chromium, server):
    """The newest conversation, kept for a day, is pinned, unpinned, and dropped after a second thought."""
    asked = {"messages": user("Ephemeral words " + text(80, 17_000)), "max_tokens": 1, **INSTANT}
    server.answer(CHAT, **asked, prompt_cache_retention="24h")

    def told(name):
        return server.client.get("/v1/cache").json()[name]

    with chromium.visit(server.url) as visit:
        is_live(visit)
        row = visit.page.locator("#tree .top > li").filter(has_text="Ephemeral").first
        is_kept_for_a_time(visit, row, told("soft_pinned"))
        row.get_by_role("button", name="pin", exact=True).click()
        row.get_by_role("button", name="unpin", exact=True).wait_for()
        assert told("pinned") == 1
        assert row.locator("b.pinned").count() == 1
        assert row.get_by_role("button", name="drop").count() == 0
        row.get_by_role("button", name="unpin", exact=True).click()
        row.get_by_role("button", name="pin", exact=True).wait_for()
        assert told("pinned") == 0
        row.get_by_role("button", name="drop").click()
        held = told("tokens")
        row.get_by_role("button", name="really drop").click()
        row.wait_for(state="detached")
        assert told("tokens") < held
        assert visit.page.locator("#notice").text_content().startswith("Dropped")
    report = server.answer(CHAT, **asked)
    assert report["usage"]["prompt_tokens_details"]["cached_tokens"] < 20


def is_kept_for_a_time(visit, row, count):
    """Above the tree, beside the row's own checkpoint, and with the request that asked for it."""
    assert count == 1
    assert "1 kept for a time" in visit.page.locator("#tree-note").text_content()
    row.locator("> .row .fold").click()
    kept = row.locator("> .more table tbody .pin").filter(
        has_text=re.compile(r"^kept until \d\d:\d\d")
    )
    kept.wait_for()  # the only one, or this fails
    newest = visit.page.locator("#recent > li").first
    newest.locator("summary").click()
    assert "Kept for a time1 checkpoint" in newest.locator(".why dl").text_content()
    row.locator("> .row .fold").click()


def test_a_prompt_is_warmed_and_pinned_from_the_page(chromium, server):
    """A system message typed in: the first conversation that begins with it finds it."""
    system = "You are terse. " + text(120, 18_000)
    with chromium.visit(server.url) as visit:
        is_live(visit)
        visit.page.click("#warm > summary")
        visit.page.fill("#warm-text", system)
        visit.page.check("#warm-pin")
        visit.page.get_by_role("button", name="Warm", exact=True).click()
        visit.page.wait_for_selector("#notice:not([hidden]):has-text('Pinned up to token')")
    asked = [{"role": "system", "content": system}, *user("Hello")]
    reply = server.answer(CHAT, messages=asked, max_tokens=1, **INSTANT)
    assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] > 100
    unpinned = server.client.request(
        "DELETE", "/v1/cache/pin", json={"messages": asked[:1], **INSTANT}
    )
    assert unpinned.status_code == 200


def test_two_requests_are_explained_on_the_page(chromium, server):
    """The kind of change, its place and its cost are those that the endpoint tells; hostile text stays text."""
    bodies = [
        {"messages": [{"role": "system", "content": f"It is {day}. {HOSTILE}"}, *user("Hello")]}
        for day in ("2026-11-25", "2026-11-26")
    ]
    told = server.answer("/v1/cache/explain", requests=bodies)
    with chromium.visit(server.url) as visit:
        is_live(visit)
        visit.page.click("#explain > summary")
        visit.page.fill("#explain-first", json.dumps(bodies[0]))
        visit.page.fill("#explain-second", json.dumps(bodies[1]))
        visit.page.get_by_role("button", name="Explain", exact=True).click()
        visit.page.wait_for_selector("#explained [data-change=date]")
        shown = visit.page.locator("#explained").text_content()
        assert told["where"] in shown
        assert f"{told['again_tokens']} tokens" in shown
        assert told["advice"] in shown
        assert visit.page.title() == "mlx-hybridcache"


def test_a_request_says_where_it_parted_ways_and_why(chromium, server):
    """A date changed in a system prompt: the entry names it, marks the place, shows both texts."""
    with chromium.visit(server.url) as visit:
        is_live(visit)
        if visit.page.locator("#more-requests").is_visible():
            visit.page.click("#more-requests")
        found = server.client.get("/v1/cache/recent").json()["data"]
        changed = next(one for one in found if one["changed"] == "date")
        entry = visit.page.locator(f"#recent > li[data-id='{changed['id']}']")
        entry.locator(".prompt .cut").wait_for()  # the only one, or this fails
        entry.locator("summary").click()
        why = entry.locator(".why").text_content()
        assert f"A date changed at token {changed['diverged_at']:,}" in why
        asked, stored = entry.locator("mark").all_text_contents()
        assert asked == changed["text"]["asked"]
        assert stored == changed["text"]["stored"]


def test_a_request_says_how_much_of_its_reply_was_drafted(chromium, server):
    """Of a reply that was written before, and what it took: a forward for several tokens."""
    for _ in range(2):
        reply = server.answer(COMPLETIONS, prompt=text(60, 21_000), max_tokens=24)
    timings = reply["timings"]
    assert timings["draft_n_accepted"] > 0
    with chromium.visit(server.url) as visit:
        is_live(visit)
        visit.page.locator("#recent summary").first.click()
        drafted = visit.page.locator("#recent dl > div").filter(has_text="Drafted").first
        assert drafted.locator("dd").text_content() == (
            f"{timings['draft_n_accepted']} of {timings['draft_n']} tokens right; "
            f"{timings['forwards_n']} forwards"
        )


def test_text_from_prompts_stays_text(chromium, server):
    """Markup in a prompt is shown as it is written, in the tree and among the requests."""
    server.answer(COMPLETIONS, prompt=HOSTILE + text(30, 19_000), max_tokens=1)
    server.answer(COMPLETIONS, prompt=HOSTILE + HOSTILE, max_tokens=1)
    with chromium.visit(server.url) as visit:
        is_live(visit)
        assert visit.page.locator("#tree .name").filter(has_text="<img src=x").count() >= 1
        visit.page.locator("#recent summary").first.click()
        assert "<img" in visit.page.locator("#recent .why").first.text_content()
        assert visit.page.locator("img").count() == 0
        assert visit.page.title() == "mlx-hybridcache"
        refused = visit.page.evaluate(
            "() => { try { document.body.innerHTML = '<b>'; return ''; } catch (e) { return e.name; } }"
        )
        assert refused == "TypeError"
        visit.said.clear()  # of that refusal


def test_with_a_key_the_page_asks_for_it_and_keeps_it_out_of_addresses(chromium):
    """Nothing before it; a wrong one is said; the right one lasts until the tab is closed."""
    with running(OURS, "--api-key", "open-sesame") as server:
        with chromium.visit(server.url, errors=True) as visit:
            visit.page.wait_for_selector("#key:not([hidden])")
            assert not visit.page.locator("#main").is_visible()
            assert visit.said == []
            for key in ("wrong", "open-sesame"):
                visit.page.fill("#key-field", key)
                visit.page.keyboard.press("Enter")
                if key == "wrong":
                    visit.page.wait_for_selector("#key-note:has-text('does not know')")
            is_live(visit)
            visit.page.reload()
            is_live(visit)
            assert not any("sesame" in each for each in visit.asked)
            assert "Authorization" not in visit.page.content()
        assert "sesame" not in server.log


def test_the_page_outlives_a_restart_of_the_server(chromium):
    """The server goes: the page says so. It comes back, empty: so is the page."""
    with running(OURS) as server:
        server.answer(COMPLETIONS, prompt=text(40), max_tokens=1)
        with chromium.visit(server.url, errors=True) as visit:
            is_live(visit)
            assert visit.page.locator("#recent > li").count() == 1
            assert server.stop() == 0
            visit.until("document.querySelector('#state').dataset.state === 'connecting'")
            server.start()
            is_live(visit)
            visit.until("document.querySelectorAll('#recent > li').length === 0")
            visit.until("document.querySelectorAll('#tree li').length === 0")
            assert visit.value("prompts") == 0


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("light", {"color_scheme": "light"}),
        ("dark", {"color_scheme": "dark"}),
        ("phone", {**PHONE, "color_scheme": "light"}),
        ("phone-dark", {**PHONE, "color_scheme": "dark"}),
    ],
)
def test_it_can_be_read_in_light_and_dark_and_on_a_phone(chromium, server, name, how):
    """Text stands out from what is behind it (4.5 to 1), and nothing is wider than the screen."""
    with chromium.visit(server.url, **how) as visit:
        is_live(visit)
        visit.page.locator("#tree .branches > .row .fold").first.click()
        visit.page.locator("#recent summary").first.click()
        visit.until("document.querySelectorAll('#tree ul ul li').length > 0")
        wide = "[document.scrollingElement.scrollWidth, window.innerWidth]"
        needed, there = visit.page.evaluate(wide)
        assert needed <= there
        assert visit.page.evaluate(FAINTEST) >= 4.5
        browser.ARTEFACTS.mkdir(parents=True, exist_ok=True)
        taken = browser.ARTEFACTS / f"page-{name}.png"
        visit.page.screenshot(path=str(taken), full_page=True)
        assert taken.stat().st_size > 10_000


FAINTEST = """() => {
  const light = ([r, g, b]) => [r, g, b]
    .map((x) => x / 255)
    .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const parts = (color) => color.match(/[\\d.]+/g).map(Number);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const found = parts(getComputedStyle(node).backgroundColor);
      if (found.length < 4 || found[3] === 1) return found;
    }
    return [255, 255, 255];
  };
  let least = 21;
  for (const node of document.querySelectorAll("main *, header *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!own || !node.offsetParent || node.disabled) continue;
    const [a, b] = [light(parts(getComputedStyle(node).color)), light(behind(node))].sort((x, y) => y - x);
    least = Math.min(least, (a + 0.05) / (b + 0.05));
  }
  return least;
}"""


def test_no_request_left_the_machine(chromium):
    """Of all that pages asked for in this file, by the browser's own record, nothing was elsewhere."""
    assert chromium.hosts() == {"127.0.0.1"}
