"""One question, asked through each client. Retries and time limits are the client's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType, ModuleType

import anthropic
import huggingface_hub
import huggingface_hub.errors
import instructor
import litellm
import openai
from instructor.core import InstructorRetryException
from langchain_anthropic import ChatAnthropic
from langchain_openai import ChatOpenAI
from llama_index.llms.openai_like import OpenAILike
from pydantic_ai import Agent, exceptions
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.clients.conftest import KEY, MESSAGES, QUESTION, City, Server


@dataclass(frozen=True)
class Question:
    """Parameters of ``QUESTION``."""

    server: Server
    key: str = KEY
    model: str = "smollm2"
    max_tokens: int = 10
    retries: int = 0
    timeout_s: float = 60

    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=self.server.openai_url,
            api_key=self.key,
            max_retries=self.retries,
            timeout=self.timeout_s,
        )

    def anthropic(self) -> anthropic.Anthropic:
        return anthropic.Anthropic(
            base_url=self.server.url,
            api_key=self.key,
            max_retries=self.retries,
            timeout=self.timeout_s,
        )


def ask_openai(ask: Question) -> str:
    answer = ask.openai().chat.completions.create(
        model=ask.model, messages=MESSAGES, max_tokens=ask.max_tokens, temperature=0
    )
    return str(answer.choices[0].message.content)


def ask_anthropic(ask: Question) -> str:
    answer = ask.anthropic().messages.create(
        model=ask.model,
        messages=MESSAGES,
        max_tokens=ask.max_tokens,
        extra_body={"temperature": 0},
    )
    return answer.content[0].text


def ask_langchain_openai(ask: Question) -> str:
    chat = ChatOpenAI(
        model=ask.model,
        base_url=ask.server.openai_url,
        api_key=ask.key,
        max_tokens=ask.max_tokens,
        temperature=0,
        max_retries=ask.retries,
        timeout=ask.timeout_s,
    )
    return str(chat.invoke(QUESTION).content)


def ask_langchain_anthropic(ask: Question) -> str:
    chat = ChatAnthropic(
        model=ask.model,
        base_url=ask.server.url,
        api_key=ask.key,
        max_tokens=ask.max_tokens,
        max_retries=ask.retries,
        timeout=ask.timeout_s,
        model_kwargs={"extra_body": {"temperature": 0}},
    )
    return str(chat.invoke(QUESTION).content)


def ask_llama_index(ask: Question) -> str:
    llm = OpenAILike(
        model=ask.model,
        api_base=ask.server.openai_url,
        api_key=ask.key,
        is_chat_model=True,
        max_tokens=ask.max_tokens,
        temperature=0,
        max_retries=ask.retries,
        timeout=ask.timeout_s,
    )
    return llm.complete(QUESTION).text


def ask_litellm_openai(ask: Question) -> str:
    return _ask_litellm(ask, "openai", ask.server.openai_url)


def ask_litellm_anthropic(ask: Question) -> str:
    return _ask_litellm(ask, "anthropic", ask.server.url)


def _ask_litellm(ask: Question, provider: str, url: str) -> str:
    answer = litellm.completion(
        model=f"{provider}/{ask.model}",
        api_base=url,
        api_key=ask.key,
        messages=MESSAGES,
        max_tokens=ask.max_tokens,
        temperature=0,
        num_retries=ask.retries,
        max_retries=ask.retries,
        timeout=ask.timeout_s,
    )
    return str(answer.choices[0].message.content)


def ask_instructor(ask: Question) -> str:
    client = instructor.from_openai(ask.openai(), mode=instructor.Mode.JSON_SCHEMA)
    city = client.create(
        model=ask.model,
        messages=MESSAGES,
        response_model=City,
        max_tokens=4 * ask.max_tokens,  # JSON takes more tokens
        temperature=0,
        max_retries=0,
    )
    return city.name


def ask_pydantic_ai(ask: Question) -> str:
    client = openai.AsyncOpenAI(
        base_url=ask.server.openai_url,
        api_key=ask.key,
        max_retries=ask.retries,
        timeout=ask.timeout_s,
    )
    model = OpenAIChatModel(ask.model, provider=OpenAIProvider(openai_client=client))
    settings = {"max_tokens": ask.max_tokens, "temperature": 0}
    return Agent(model, model_settings=settings).run_sync(QUESTION).output


def ask_huggingface(ask: Question) -> str:
    client = huggingface_hub.InferenceClient(
        base_url=ask.server.url, api_key=ask.key, timeout=ask.timeout_s
    )
    answer = client.chat_completion(
        MESSAGES, model=ask.model, max_tokens=ask.max_tokens, temperature=0
    )
    return str(answer.choices[0].message.content)


@dataclass(frozen=True)
class Client:
    """Client and the exceptions that its users catch."""

    ask: Callable[[Question], str]
    bad_request: type[Exception]
    wrong_key: type[Exception]
    unknown_model: type[Exception]
    unavailable: type[Exception]
    timed_out: type[Exception]
    retries: bool = True
    """True if the client retries as Retry-After says."""


def _vendor(ask: Callable[[Question], str], vendor: ModuleType) -> Client:
    """Return a client that raises the exceptions of ``vendor``, which OpenAI's names have."""
    return Client(
        ask,
        bad_request=vendor.BadRequestError,
        wrong_key=vendor.AuthenticationError,
        unknown_model=vendor.NotFoundError,
        unavailable=vendor.InternalServerError,
        timed_out=vendor.APITimeoutError,
    )


def _litellm(ask: Callable[[Question], str], unavailable: type[Exception], retries: bool) -> Client:
    return Client(
        ask,
        bad_request=litellm.BadRequestError,
        wrong_key=litellm.AuthenticationError,
        unknown_model=litellm.NotFoundError,
        unavailable=unavailable,
        timed_out=litellm.Timeout,
        retries=retries,
    )


def _uniform(
    ask: Callable[[Question], str],
    error: type[Exception],
    timed_out: type[Exception],
    retries: bool = True,
) -> Client:
    """Return a client with one exception for every status."""
    return Client(ask, error, error, error, error, timed_out, retries)


CLIENTS: Mapping[str, Client] = MappingProxyType(
    {
        "openai": _vendor(ask_openai, openai),
        "anthropic": _vendor(ask_anthropic, anthropic),
        "langchain-openai": _vendor(ask_langchain_openai, openai),
        "langchain-anthropic": _vendor(ask_langchain_anthropic, anthropic),
        "llama-index": _vendor(ask_llama_index, openai),
        "litellm-openai": _litellm(
            ask_litellm_openai, litellm.ServiceUnavailableError, retries=True
        ),
        # With this provider, it retries at once and ignores Retry-After.
        "litellm-anthropic": _litellm(
            ask_litellm_anthropic, litellm.InternalServerError, retries=False
        ),
        "instructor": _uniform(
            ask_instructor, InstructorRetryException, timed_out=InstructorRetryException
        ),
        "pydantic-ai": _uniform(
            ask_pydantic_ai, exceptions.ModelHTTPError, timed_out=exceptions.ModelAPIError
        ),
        "huggingface_hub": _uniform(
            ask_huggingface,
            huggingface_hub.errors.HfHubHTTPError,
            timed_out=huggingface_hub.InferenceTimeoutError,
            retries=False,
        ),
    }
)
