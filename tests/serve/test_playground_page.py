"""Playground in a real browser, with a router, links and engines whose answers a test chooses."""

import asyncio
import hashlib
import json
import subprocess
import sys
from contextlib import asynccontextmanager

import pytest
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from tests import asgi
from tests.serve.browser import Page, listening, start
from tests.serve.gateway_kit import gateway_world, read_body
from tests.serve.scripted_generator import ROUTES, ScriptedGenerator
from tests.serve.test_knowledge import knowledge_world
from tests.serve.test_usage import BODY, COMPLETIONS, accounted_pool

KEY = "open sesame"
PARTS = ["Paris ", "is <b>the</b> ", "capital."]
TEXT = "".join(PARTS)
LABELS = {
    "scores": [{"label": "praise", "score": 0.9}, {"label": "complaint", "score": 0.1}],
    "explanation": {
        "method": "integrated_gradients",
        "words": [{"text": "thanks", "start": 0, "end": 6}],
        "labels": [
            {
                "label": "praise",
                **{"score": 0.9, "baseline": 0.5, "error": 0.0, "contributions": [0.4]},
            }
        ],
    },
}


def reply(body):
    if "fail" in body["messages"][-1]["content"]:
        raise RuntimeError("secret internals")
    return PARTS


class Classifier:
    """Application that answers every text with the same labels."""

    def __init__(self):
        self.bodies = []

    async def __call__(self, scope, receive, send):
        self.bodies.append(json.loads(await read_body(receive)))
        document = {"data": [LABELS], "usage": {"prompt_tokens": 3, "total_tokens": 3}}
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(document).encode()})


class Playground:
    """A router with the generators `gen` and `other` and the classifier `cls`."""

    def __init__(self, world, url):
        self.world = world
        self.url = url
        self.gen, self.other = ScriptedGenerator(reply), ScriptedGenerator(reply)
        self.classifier = Classifier()
        self._loop = asyncio.get_running_loop()

    async def start(self):
        await self.world.serve(self.gen, "gen", "gen-1", ROUTES)
        await self.world.serve(self.other, "other", "other-1", ROUTES)
        await self.world.serve(self.classifier, "cls", "cls-1", ("/classify",))

    def go_on(self):
        """Let the streams of `gen` go on behind their first part."""
        self._loop.call_soon_threadsafe(self.gen.goes_on.set)

    def kill(self, name):
        asyncio.run_coroutine_threadsafe(self.world.kill(name), self._loop).result(60)


@asynccontextmanager
async def playground(ears=None, **router):
    """Run a router; ``ears`` is the application of a speech model."""
    more = [{"name": "other", "model": "m"}]
    if ears is not None:
        more.append({"name": "ears", "model": "m"})
    auto = {"default": "gen"}
    async with (
        gateway_world(more_generators=more, auto=auto, **router) as world,
        listening(world.app) as url,
    ):
        running = Playground(world, url)
        await running.start()
        if ears is not None:
            await world.serve(ears, "ears", "ears-1", ("/v1/audio/transcriptions",))
        try:
            yield running
        finally:
            running.gen.goes_on.set()  # a stream would keep the server open


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver = start(tmp_path_factory.mktemp("chromium"))
    yield PlaygroundPage(driver)
    driver.quit()


class PlaygroundPage(Page):
    """Controls and conversations of the page."""

    def write(self, text):
        self.by("message").send_keys(text)

    def ask(self, text, outcome="Answered."):
        """Send a message and wait until all answers ended."""
        self.write(text + Keys.ENTER)
        self.until(lambda: self.by("status").text == outcome)

    def set(self, name, value):
        field = self.all(f"#parameters [name={name}]")[0]
        field.clear()
        field.send_keys(value)

    def texts(self, column=0):
        """Return the texts of a conversation, of the user and the model by turns."""
        log = self.all(".log")[column]
        return [text.text for text in log.find_elements("css selector", ".text")]

    def figures(self):
        """Return the figures of the last answer by name."""
        pairs = self.all(".message:last-child .figures div")
        return dict(pair.text.split("\n") for pair in pairs)

    def notes(self, column=0):
        log = self.all(".log")[column]
        return [note.text for note in log.find_elements("css selector", ".notes")]

    def code(self, language):
        Select(self.by("language")).select_by_value(language)
        return self.by("source").text


async def test_chat_streams_and_stops_and_keeps_the_conversation(browser):
    def use(running):
        gen = running.gen
        browser.open(f"{running.url}/playground", width=1100)
        options = [option.text for option in Select(browser.all("select.model")[0]).options]
        assert options == ["gen", "other", "auto"]
        gen.goes_on.clear()
        browser.by("system").send_keys("Be brief.")
        for name, value in {"temperature": "0.5", "top_p": "0.9", "seed": "7"}.items():
            browser.set(name, value)
        browser.write("What is the capital?" + Keys.ENTER)
        browser.until(lambda: browser.texts()[1:] == ["".join(PARTS[:2])])
        assert browser.by("status").text == "Answering …"
        assert not browser.by("send").is_enabled()
        running.go_on()
        browser.until(lambda: browser.by("status").text == "Answered.")
        assert browser.texts() == ["What is the capital?", TEXT]
        assert gen.bodies[-1] == {
            "model": "gen",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "What is the capital?"},
            ],
            **{"max_tokens": 256, "temperature": 0.5, "top_p": 0.9, "seed": 7},
            **{"stream": True, "stream_options": {"include_usage": True}},
        }
        figures = browser.figures()
        assert figures["first token"].endswith("s")
        assert figures["time"].endswith("s")
        assert figures["tokens"] == "– + –"
        assert figures["energy"] == figures["cost"] == figures["tokens/s"] == "–"

        gen.goes_on.clear()
        browser.write("And of Spain?" + Keys.ENTER)
        browser.until(lambda: len(browser.texts()) == 4 and browser.texts()[3])
        browser.by("stop").click()
        browser.until(lambda: browser.by("status").text == "Stopped.")
        browser.until(lambda: gen.cancelled == 1)
        assert browser.notes() == ["Stopped."]
        assert browser.script("document.activeElement.id") == "message"
        running.go_on()
        browser.ask("Go on.")
        roles = [message["role"] for message in gen.bodies[-1]["messages"]]
        assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
        browser.by("clear").click()
        assert browser.texts() == []
        assert browser.loads_only_from(running.url)
        assert browser.driver.get_log("browser") == []

    async with playground() as running:
        await asyncio.to_thread(use, running)


async def test_two_models_answer_side_by_side_and_errors_have_their_type(browser):
    def use(running):
        browser.open(f"{running.url}/playground", width=1100)
        browser.by("compare").click()
        browser.ask("One?")
        assert browser.texts(0) == browser.texts(1) == ["One?", TEXT]
        assert [app.bodies[-1]["model"] for app in (running.gen, running.other)] == ["gen", "other"]
        first, second = browser.all(".column")
        assert first.rect["y"] == second.rect["y"]
        Select(browser.all("select.model")[1]).select_by_visible_text("auto")
        browser.ask("Two?")
        assert browser.notes(1) == ["Model choice: gen; rule=default"]

        Select(browser.all("select.model")[1]).select_by_visible_text("other")
        browser.ask("Please fail.", "Failed.")
        assert browser.notes(0)[0].startswith("InternalServerError (500): ")
        assert "Request id: " in browser.notes(0)[0]
        assert "secret" not in browser.notes(0)[0]
        browser.ask("Three?")  # the failed message is not sent again
        contents = [message["content"] for message in running.gen.bodies[-1]["messages"]]
        assert contents == ["One?", TEXT, "Two?", TEXT, "Three?"]

        running.gen.goes_on.clear()
        browser.write("Four?" + Keys.ENTER)
        browser.until(lambda: browser.texts(0)[-1].startswith("Paris"))
        running.kill("gen-1")
        browser.until(lambda: browser.by("status").text == "Failed.")
        assert "ServiceUnavailableError (503): " in browser.notes(0)[-1]
        assert browser.texts(0)[-1].startswith("Paris")
        assert browser.texts(1)[-1] == TEXT

    async with playground() as running:
        await asyncio.to_thread(use, running)


async def test_tokens_energy_and_cost_of_an_answer(browser, tmp_path):
    def use(url):
        browser.open(f"{url}/playground")
        browser.set("max_tokens", "20")
        browser.ask("one two three")
        figures = browser.figures()
        assert figures["tokens"].endswith(" + 20")
        assert float(figures["tokens/s"].replace(",", "")) > 0
        assert figures["energy"].endswith(" J (estimate)")
        assert figures["cost"].endswith(" EUR")
        assert browser.notes() == ["Ended at the limit of tokens."]

    async with accounted_pool(tmp_path) as pool, listening(pool.app) as url:
        await asgi.post(pool.app, COMPLETIONS, BODY)
        await pool.spend(cpu_s=2.0)
        await asyncio.to_thread(use, url)


async def test_classification_with_its_explanation_on_a_phone(browser):
    def use(running):
        for scheme in ("light", "dark"):
            browser.open(f"{running.url}/playground", scheme, width=360)
            browser.ask("word" * 60)
            assert browser.script("document.documentElement.scrollWidth") <= 360
            ground, ink = browser.colors()
            assert (ground > 200 > 60 > ink) if scheme == "light" else (ground < 60 < 200 < ink)
        browser.by("chat-tab").send_keys(Keys.ARROW_RIGHT)
        assert browser.script("document.activeElement.id") == "classify-tab"
        assert not browser.by("chat").is_displayed()
        assert browser.script("location.hash") == "#classify"
        browser.driver.execute_script("arguments[0].value = 'thanks'", browser.by("explain-text"))
        browser.by("explain-go").click()
        browser.until(lambda: browser.all(".word"))
        assert running.classifier.bodies[-1] == {
            **{"model": "cls", "input": "thanks", "truncate": True},
            "explain": {"method": "integrated_gradients"},
        }
        assert [bar.text.split("\n")[0] for bar in browser.all(".bar")] == ["praise", "complaint"]
        assert "tokens\n3" in browser.by("explain-figures").text
        assert browser.script("document.documentElement.scrollWidth") <= 360

    async with playground() as running:
        await asyncio.to_thread(use, running)


async def test_a_knowledge_base_answers_with_the_passages_that_it_cites(browser):
    def use(url):
        question = "Where does the Elbe end?"
        browser.open(f"{url}/playground#knowledge", width=1100)
        browser.until(lambda: browser.by("ask").is_enabled())
        assert not browser.by("chat").is_displayed()
        browser.by("question").send_keys(question + Keys.ENTER)
        browser.until(lambda: browser.by("ask-status").text == "Answered.")
        assert browser.by("found-text").text == "It ends in the North Sea [1], not here [9]."
        assert "relevance" in browser.by("found-figures").text
        (cite,) = browser.all(".cite")
        cite.click()
        (passage,) = browser.all("#citations details")
        assert browser.script("document.activeElement.textContent") == "[1] rivers.md › Elbe"
        assert "The Elbe ends in the North Sea" in passage.text
        assert browser.violations() == []
        browser.by("code").find_element("tag name", "summary").click()
        done = subprocess.run(
            ["bash", "-c", browser.code("curl")], capture_output=True, text=True, timeout=240
        )
        assert json.loads(done.stdout)["citations"][0]["document"] == "rivers.md"
        compile(browser.code("openai"), "openai", "exec")
        assert f'base.answer(\n    "{question}",\n    model="gen",' in browser.code("client")
        browser.by("question").clear()
        browser.by("question").send_keys("zzz")
        browser.by("ask").click()
        browser.until(
            lambda: browser.by("found-text").text == "The answer is not in the documents."
        )
        browser.open(f"{url}/playground#knowledge", "dark", width=360)
        browser.until(lambda: browser.by("ask").is_enabled())
        assert browser.script("document.documentElement.scrollWidth") <= 360
        browser.by("ask-tab").send_keys(Keys.ARROW_RIGHT)
        assert browser.by("chat").is_displayed()

    def answer(_):
        return "It ends in the North Sea [1], not here [9]."

    settings = {"store_timeout_s": 250}  # the first use imports LanceDB
    async with knowledge_world(answer, knowledge=settings) as knowledge:
        await knowledge.result("POST", "", {"name": "docs", "chunk_tokens": 32})
        await knowledge.add("docs", "rivers.md", "# Elbe\n\nThe Elbe ends in the North Sea.\n")
        async with listening(knowledge.tasks.world.app) as url:
            await asyncio.to_thread(use, url)


class Listener:
    """Speech model whose transcripts have two parts; it keeps the forms it gets."""

    def __init__(self):
        self.forms = []

    async def __call__(self, scope, receive, send):
        self.forms.append(await read_body(receive))
        events = [
            {"type": "transcript.text.delta", "delta": "Hello "},
            {"type": "transcript.text.delta", "delta": "<b>world</b>."},
            {
                "type": "transcript.text.done",
                "text": "Hello <b>world</b>.",
                "usage": {"type": "duration", "seconds": 3},
            },
        ]
        lines = [json.dumps(event) for event in events] + ["[DONE]"]
        body = "".join(f"data: {line}\n\n" for line in lines).encode()
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


async def test_a_recording_is_transcribed(browser, tmp_path):
    recording = tmp_path / "it's.wav"
    recording.write_bytes(b"RIFF sound")
    listener = Listener()

    def use(running):
        browser.open(f"{running.url}/playground", width=1100)
        assert "ears" not in [option.text for option in browser.all("select.model option")]
        browser.by("speech-tab").click()
        assert [option.text for option in browser.all("#speech-model option")] == ["ears"]
        assert browser.by("record").is_displayed()
        browser.by("recording").send_keys(str(recording))
        browser.by("transcribe").click()
        browser.until(lambda: browser.by("speech-status").text == "Transcribed.")
        assert browser.by("transcript-text").text == "Hello <b>world</b>."
        assert "recording" in browser.by("transcript-figures").text
        assert b'name="model"\r\n\r\nears' in listener.forms[0]
        assert b"RIFF sound" in listener.forms[0]
        assert browser.violations() == []
        browser.by("code").find_element("tag name", "summary").click()
        done = subprocess.run(
            ["bash", "-c", browser.code("curl")],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert "Hello" in done.stdout, done.stderr
        compile(browser.code("openai"), "openai", "exec")
        assert 'transcribe("it\'s.wav", model="ears")' in browser.code("client")
        browser.open(f"{running.url}/playground#speech", "dark", width=360)
        browser.until(lambda: browser.by("speech").is_displayed())
        assert browser.script("document.documentElement.scrollWidth") <= 360

    async with playground(ears=listener) as running:
        await asyncio.to_thread(use, running)


async def test_the_key_is_entered_once_for_all_pages(browser):
    def use(running):
        browser.open(f"{running.url}/playground")
        browser.until(lambda: browser.by("sign-in").is_displayed())
        assert browser.by("key-reason").text == "This router requires an API key."
        browser.ask("One?", "Failed.")
        assert browser.notes()[0].startswith("AuthenticationError (401): ")
        browser.sign_in("wrong")
        browser.until(lambda: browser.by("key-reason").text == "This API key is unknown.")
        browser.sign_in(KEY)
        browser.until(lambda: not browser.by("sign-in").is_displayed())
        browser.ask("One?")
        assert browser.texts()[-1] == TEXT
        browser.by("code").find_element("tag name", "summary").click()
        for language in ("curl", "openai", "client"):
            assert KEY not in browser.code(language)
        assert "$TANDEM_API_KEY" in browser.code("curl")
        (dashboard, *_) = browser.all("nav a")
        dashboard.click()
        browser.until(lambda: browser.by("state").text == "live")
        assert browser.all("nav a[aria-current=page]")[0].text == "Dashboard"
        browser.open(f"{running.url}/explain")
        browser.by("explain-go").click()
        browser.until(lambda: browser.all(".word"))
        browser.by("key-button").click()
        browser.by("forget").click()
        browser.until(lambda: browser.script("sessionStorage.length") == 0)

    hashed = hashlib.sha256(KEY.encode()).hexdigest()
    async with playground(operator_keys_sha256=[hashed]) as running:
        await asyncio.to_thread(use, running)


async def test_shown_code_sends_the_same_request(browser):
    def use(running):
        browser.open(f"{running.url}/playground")
        browser.by("code").find_element("tag name", "summary").click()
        browser.by("system").send_keys('It\'s "brief".')
        browser.ask("One?")
        browser.write("Two\\?")
        sent = len(running.gen.bodies)
        for command in (
            ["bash", "-c", browser.code("curl")],
            [sys.executable, "-c", browser.code("openai")],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
            assert done.returncode == 0, done.stderr
            assert PARTS[-1] in done.stdout
        assert len(running.gen.bodies) == sent + 2
        for body in running.gen.bodies[sent:]:
            assert body.pop("stream") is True
            assert body == {
                "model": "gen",
                "messages": [
                    {"role": "system", "content": 'It\'s "brief".'},
                    {"role": "user", "content": "One?"},
                    {"role": "assistant", "content": TEXT},
                    {"role": "user", "content": "Two\\?"},
                ],
                "max_tokens": 256,
            }
        assert called(browser.code("client"), "stream") == body
        browser.by("classify-tab").click()
        assert called(browser.code("client"), "classify") == {
            "messages": browser.by("explain-text").get_attribute("value"),
            **{"model": "cls", "truncate": True},
        }
        compile(browser.code("openai"), "openai", "exec")

    async with playground() as running:
        await asyncio.to_thread(use, running)


def called(code, method):
    """Run code for our client without a cluster; return the arguments of its call."""
    found = {}

    class Client:
        def __getattr__(self, name):
            assert name == method

            def record(text, **options):
                found.update(messages=text, **options)
                return []

            return record

    source = code.replace("from cluster.client import Tandem", "")
    exec(source, {"Tandem": Client, "print": lambda *_: None})
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_pages_are_accessible(browser, scheme):
    def use(running):
        browser.open(f"{running.url}/playground", scheme, width=1100)
        browser.by("compare").click()
        browser.by("code").find_element("tag name", "summary").click()
        browser.ask("One?")
        browser.ask("Please fail.", "Failed.")
        assert browser.violations() == []
        browser.by("classify-tab").click()
        browser.by("explain-go").click()
        browser.until(lambda: browser.all(".word"))
        browser.by("key-button").click()
        assert browser.violations() == []
        browser.open(f"{running.url}/explain", scheme, width=360)
        browser.by("explain-go").click()
        browser.until(lambda: browser.all(".word"))
        assert browser.violations() == []
        for width in (1100, 360):
            browser.open(f"{running.url}/dashboard", scheme, width)
            browser.until(lambda: browser.all("#failures button"))
            browser.driver.execute_script("arguments[0].focus()", browser.all(".about button")[0])
            assert browser.violations() == []

    async with playground() as running:
        await asyncio.to_thread(use, running)


async def test_no_page_runs_or_loads_anything_that_its_policy_does_not_name():
    async with playground() as running:
        for name in ("dashboard", "explain", "playground"):
            answer = await asgi.get(running.world.app, f"/{name}")
            policy = answer.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'; script-src 'sha256-")
            assert "unsafe" not in policy
            text = answer.body.decode()
            assert "include:" not in text
            assert " style=" not in text
            assert " on" not in text.partition("<style>")[0]
