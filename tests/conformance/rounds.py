"""Tools and a prompt that take more than one round, and a tool that wants a capability."""

from __future__ import annotations

from typing import Any

from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.prompts.base import Message, UserMessage
from mcp.shared.exceptions import MCPError
from mcp.types import (
    MISSING_REQUIRED_CLIENT_CAPABILITY,
    CreateMessageRequest,
    CreateMessageRequestParams,
    CreateMessageResult,
    ElicitRequest,
    ElicitRequestFormParams,
    ElicitResult,
    InputRequiredResult,
    ListRootsRequest,
    ListRootsResult,
    SamplingMessage,
    TextContent,
)

Asking = Context[Any, Any]
Question = ElicitRequest | CreateMessageRequest | ListRootsRequest


def _form(message: str, key: str, kind: str = "string") -> ElicitRequest:
    schema = {"type": "object", "properties": {key: {"type": kind}}, "required": [key]}
    return ElicitRequest(params=ElicitRequestFormParams(message=message, requested_schema=schema))


def _sampling(text: str, max_tokens: int) -> CreateMessageRequest:
    message = SamplingMessage(role="user", content=TextContent(type="text", text=text))
    params = CreateMessageRequestParams(messages=[message], max_tokens=max_tokens)
    return CreateMessageRequest(params=params)


def _answer(context: Asking, key: str) -> object:
    return (context.input_responses or {}).get(key)


def _entered(context: Asking, key: str, field: str) -> object:
    """What was entered in a form; None where it was not filled in."""
    answer = _answer(context, key)
    if not isinstance(answer, ElicitResult) or answer.action != "accept":
        return None
    return (answer.content or {}).get(field)


def _ask(state: str | None = None, **requests: Question) -> InputRequiredResult:
    return InputRequiredResult(input_requests=dict(requests), request_state=state)


async def test_input_required_result_elicitation(context: Asking) -> str | InputRequiredResult:
    """Asks for a name, and greets."""
    name = _entered(context, "user_name", "name")
    if name is None:
        return _ask(user_name=_form("What is your name?", "name"))
    return f"Hello, {name}!"


async def test_input_required_result_sampling(context: Asking) -> str | InputRequiredResult:
    """Asks the client's model for a capital."""
    answer = _answer(context, "capital_question")
    if not isinstance(answer, CreateMessageResult):
        return _ask(capital_question=_sampling("What is the capital of France?", 100))
    return f"The model says: {answer.content}"


async def test_input_required_result_list_roots(context: Asking) -> str | InputRequiredResult:
    """Asks for the client's roots."""
    answer = _answer(context, "client_roots")
    if not isinstance(answer, ListRootsResult):
        return _ask(client_roots=ListRootsRequest())
    return f"Roots: {', '.join(str(root.uri) for root in answer.roots)}"


async def test_streaming_elicitation(context: Asking) -> str | InputRequiredResult:
    """Asks in its result, never on the stream."""
    if _entered(context, "confirm", "ok") is None:
        return _ask(confirm=_form("Please confirm", "ok", "boolean"))
    return "confirmed"


async def confirm(context: Asking) -> str | InputRequiredResult:
    """Asks to confirm, and knows its own state again."""
    if context.request_state == "asked" and _entered(context, "confirm", "ok") is not None:
        return "state-ok"
    return _ask("asked", confirm=_form("Please confirm", "ok", "boolean"))


async def test_input_required_result_multiple_inputs(
    context: Asking,
) -> str | InputRequiredResult:
    """Asks for three things at once."""
    questions: dict[str, Question] = {
        "user_name": _form("What is your name?", "name"),
        "greeting": _sampling("Generate a greeting", 50),
        "client_roots": ListRootsRequest(),
    }
    if questions.keys() <= (context.input_responses or {}).keys():
        return "everything was answered"
    return InputRequiredResult(input_requests=questions, request_state="asked")


async def test_input_required_result_multi_round(context: Asking) -> str | InputRequiredResult:
    """Asks twice, one after the other."""
    match context.request_state:
        case "named" if (color := _entered(context, "step2", "color")) is not None:
            return f"complete, in {color}"
        case "asked" if _entered(context, "step1", "name") is not None:
            return _ask("named", step2=_form("Step 2: What is your favorite color?", "color"))
        case _:
            return _ask("asked", step1=_form("Step 1: What is your name?", "name"))


async def test_input_required_result_capabilities(
    context: Asking,
) -> str | InputRequiredResult:
    """Asks only what the client can be asked."""
    declared = context.client_capabilities
    if declared is not None and declared.elicitation is not None:
        return _ask(name=_form("What is your name?", "name"))
    if declared is not None and declared.sampling is not None:
        return _ask(greeting=_sampling("Generate a greeting", 50))
    return "this client can not be asked"


async def test_missing_capability(context: Asking) -> str:
    """Wants a client that can sample."""
    declared = context.client_capabilities
    if declared is None or declared.sampling is None:
        raise MCPError(
            code=MISSING_REQUIRED_CLIENT_CAPABILITY,
            message="this tool needs a client that can sample",
            data={"requiredCapabilities": {"sampling": {}}},
        )
    return "this client can sample"


async def test_input_required_result_prompt(
    context: Asking,
) -> list[Message] | InputRequiredResult:
    """Asks for its context."""
    entered = _entered(context, "user_context", "context")
    if entered is None:
        return _ask(user_context=_form("What context should the prompt use?", "context"))
    return [UserMessage(f"With this context: {entered}")]


TOOLS = (
    test_input_required_result_elicitation,
    test_input_required_result_sampling,
    test_input_required_result_list_roots,
    test_streaming_elicitation,
    test_input_required_result_multiple_inputs,
    test_input_required_result_multi_round,
    test_input_required_result_capabilities,
    test_missing_capability,
)
CONFIRMING = (
    "test_input_required_result_request_state",
    "test_input_required_result_tampered_state",
)


def add(server: MCPServer[Any]) -> None:
    """Everything of this module."""
    for tool in TOOLS:
        server.add_tool(tool, structured_output=False)
    for name in CONFIRMING:
        server.add_tool(confirm, name, structured_output=False)
    server.prompt()(test_input_required_result_prompt)
