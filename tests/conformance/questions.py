"""Tools that ask the client while they run: requests of the server in the handshake revisions."""

from __future__ import annotations

from typing import Any

from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.shared.message import ServerMessageMetadata
from mcp.types import (
    CreateMessageRequest,
    CreateMessageRequestParams,
    CreateMessageResult,
    SamplingMessage,
    TextContent,
)

FIRST_TO_THIRD = ("First", "Second", "Third")


def add(server: MCPServer[Any]) -> None:
    """Everything of this module."""

    @server.tool(structured_output=False)
    async def test_sampling(prompt: str, context: Context[Any, Any]) -> str:
        """Asks the client's model."""
        return f"LLM response: {await _sample(context, prompt)}"

    @server.tool(structured_output=False)
    async def test_elicitation(message: str, context: Context[Any, Any]) -> str:
        """Asks the user for a name and an address."""
        schema = _form(
            username={"type": "string", "description": "User's response"},
            email={"type": "string", "description": "User's email address"},
        )
        required = {**schema, "required": ["username", "email"]}
        return f"User response: {await _elicit(context, message, required)}"

    @server.tool(structured_output=False)
    async def test_elicitation_sep1034_defaults(context: Context[Any, Any]) -> str:
        """Asks with a default for each primitive type."""
        answer = await _elicit(context, "Please check the defaults", DEFAULTS)
        return f"Elicitation completed: {answer}"

    @server.tool(structured_output=False)
    async def test_elicitation_sep1330_enums(context: Context[Any, Any]) -> str:
        """Asks with each kind of choice."""
        answer = await _elicit(context, "Please choose", CHOICES)
        return f"Elicitation completed: {answer}"


async def _sample(context: Context[Any, Any], prompt: str) -> str:
    message = SamplingMessage(role="user", content=TextContent(type="text", text=prompt))
    answer = await context.session.send_request(
        CreateMessageRequest(params=CreateMessageRequestParams(messages=[message], max_tokens=100)),
        CreateMessageResult,
        metadata=ServerMessageMetadata(related_request_id=context.request_id),
    )
    return answer.content.text if isinstance(answer.content, TextContent) else "not a text"


async def _elicit(context: Context[Any, Any], message: str, schema: dict[str, Any]) -> str:
    answer = await context.session.elicit_form(message, schema, context.request_id)
    return f"action={answer.action}, content={answer.content}"


def _form(**properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


def _titled(prefix: str, noun: str) -> list[dict[str, str]]:
    return [
        {"const": f"{prefix}{number}", "title": f"{ordinal} {noun}"}
        for number, ordinal in enumerate(FIRST_TO_THIRD, 1)
    ]


DEFAULTS = _form(
    name={"type": "string", "default": "John Doe"},
    age={"type": "integer", "default": 30},
    score={"type": "number", "default": 95.5},
    status={"type": "string", "enum": ["active", "inactive", "pending"], "default": "active"},
    verified={"type": "boolean", "default": True},
)

OPTIONS = ["option1", "option2", "option3"]
CHOICES = _form(
    untitledSingle={"type": "string", "enum": OPTIONS},
    titledSingle={"type": "string", "oneOf": _titled("value", "Option")},
    legacyEnum={
        "type": "string",
        "enum": ["opt1", "opt2", "opt3"],
        "enumNames": ["Option One", "Option Two", "Option Three"],
    },
    untitledMulti={"type": "array", "items": {"type": "string", "enum": OPTIONS}},
    titledMulti={"type": "array", "items": {"anyOf": _titled("value", "Choice")}},
)
