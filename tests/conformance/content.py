"""What the fixture shows: tools, resources and prompts that answer in one round."""

from __future__ import annotations

import base64
import json
from typing import Annotated, Any

import anyio
from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.mcpserver.prompts.base import Message, UserMessage
from mcp.types import (
    AudioContent,
    ContentBlock,
    EmbeddedResource,
    ImageContent,
    TextContent,
    TextResourceContents,
)
from pydantic import Field

from tests.conformance.schema import SCHEMA_2020_12, SCHEMA_TOOL

PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJ"
    "AAAADUlEQVR42mP8z8DwHwAFBQIAX8jx0gAAAABJRU5ErkJggg=="
)
WAV = "UklGRiQAAABXQVZFZm10IBAAAAABAAEARKwAAIhYAQACABAAZGF0YQAAAAA="
PAUSE = 0.02
UNTIL_PRIMED = 0.3  # the first event of a stream is on its way by then, also on a busy machine


def add(server: MCPServer[Any]) -> None:
    """Everything of this module."""
    _add_plain_tools(server)
    _add_schema_tools(server)
    _add_talking_tools(server)
    _add_resources(server)
    _add_prompts(server)


def _text(text: str) -> TextContent:
    return TextContent(type="text", text=text)


def _image() -> ImageContent:
    return ImageContent(type="image", data=PNG, mime_type="image/png")


def _embedded(uri: str, mime_type: str, text: str) -> EmbeddedResource:
    resource = TextResourceContents(uri=uri, mime_type=mime_type, text=text)
    return EmbeddedResource(type="resource", resource=resource)


def _add_plain_tools(server: MCPServer[Any]) -> None:
    @server.tool(structured_output=False)
    def test_simple_text() -> str:
        """Answers with text."""
        return "This is a simple text response for testing."

    @server.tool(structured_output=False)
    def test_image_content() -> list[ContentBlock]:
        """Answers with an image."""
        return [_image()]

    @server.tool(structured_output=False)
    def test_audio_content() -> list[ContentBlock]:
        """Answers with a sound."""
        return [AudioContent(type="audio", data=WAV, mime_type="audio/wav")]

    @server.tool(structured_output=False)
    def test_embedded_resource() -> list[ContentBlock]:
        """Answers with a resource."""
        return [_embedded("test://embedded-resource", "text/plain", "An embedded resource.")]

    @server.tool(structured_output=False)
    def test_multiple_content_types() -> list[ContentBlock]:
        """Answers with text, an image and a resource."""
        data = json.dumps({"test": "data", "value": 123})
        resource = _embedded("test://mixed-content-resource", "application/json", data)
        return [_text("Multiple content types test:"), _image(), resource]

    @server.tool(structured_output=False)
    def test_error_handling() -> str:
        """Fails, always."""
        raise ToolError("This tool intentionally returns an error for testing")


def _add_schema_tools(server: MCPServer[Any]) -> None:
    @server.tool(structured_output=False)
    def test_header_parameter(
        region: Annotated[str, Field(json_schema_extra={"x-mcp-header": "Region"})],
    ) -> str:
        """Takes an argument that a header mirrors."""
        return f"region: {region}"

    @server.tool(name=SCHEMA_TOOL, structured_output=False)
    def with_schema() -> str:
        """Has a schema with much of what JSON Schema 2020-12 knows."""
        return "accepted"

    tool = server._tool_manager.get_tool(SCHEMA_TOOL)
    assert tool is not None
    tool.parameters = SCHEMA_2020_12


def _add_talking_tools(server: MCPServer[Any]) -> None:
    @server.tool(structured_output=False)
    async def test_tool_with_logging(context: Context[Any, Any]) -> str:
        """Logs three times on its way."""
        await context.info("Tool execution started")
        await anyio.sleep(PAUSE)
        await context.info("Tool processing data")
        await anyio.sleep(PAUSE)
        await context.info("Tool execution completed")
        return "logged three times"

    @server.tool(structured_output=False)
    async def test_logging_tool(context: Context[Any, Any]) -> str:
        """Logs once, for who has asked for it."""
        await context.info("a line of the log")
        return "logged, where that was asked for"

    @server.tool(structured_output=False)
    async def test_tool_with_progress(context: Context[Any, Any]) -> str:
        """Reports 0, 50 and 100 of 100."""
        for progress in (0, 50, 100):
            await context.report_progress(progress, 100)
            await anyio.sleep(PAUSE)
        return "done, step by step"

    @server.tool(structured_output=False)
    async def test_reconnection(context: Context[Any, Any]) -> str:
        """Closes its stream on its way: the client comes back for the answer."""
        await anyio.sleep(UNTIL_PRIMED)
        await context.close_sse_stream()
        await anyio.sleep(UNTIL_PRIMED)
        return "here after the reconnection"

    @server.tool(structured_output=False)
    async def test_trigger_tool_change(context: Context[Any, Any]) -> str:
        """Says that the tools have changed."""
        await context.notify_tools_changed()
        return "said so"

    @server.tool(structured_output=False)
    async def test_trigger_prompt_change(context: Context[Any, Any]) -> str:
        """Says that the prompts have changed."""
        await context.notify_prompts_changed()
        return "said so"


def _add_resources(server: MCPServer[Any]) -> None:
    @server.resource("test://static-text", mime_type="text/plain", description="A text")
    def static_text() -> str:
        return "This is the content of the static text resource."

    @server.resource("test://static-binary", mime_type="image/png", description="An image")
    def static_binary() -> bytes:
        return base64.b64decode(PNG)

    @server.resource("test://watched-resource", mime_type="text/plain", description="One to watch")
    def watched_resource() -> str:
        return "This is worth a subscription."

    @server.resource(
        "test://template/{id}/data", mime_type="application/json", description="A template"
    )
    def template_data(id: str) -> str:  # noqa: A002 - the parameter's name in the template
        return json.dumps({"id": id, "templateTest": True, "data": f"Data for ID: {id}"})


def _add_prompts(server: MCPServer[Any]) -> None:
    @server.prompt()
    def test_simple_prompt() -> list[Message]:
        """One message."""
        return [UserMessage("This is a simple prompt for testing.")]

    @server.prompt()
    def test_prompt_with_arguments(arg1: str, arg2: str) -> list[Message]:
        """One message with two arguments in it."""
        return [UserMessage(f"Prompt with arguments: arg1='{arg1}', arg2='{arg2}'")]

    @server.prompt()
    def test_prompt_with_embedded_resource(resourceUri: str) -> list[Message]:  # noqa: N803
        """A resource, and what to do with it."""
        resource = _embedded(resourceUri, "text/plain", "Embedded resource content for testing.")
        return [UserMessage(resource), UserMessage("Please process the embedded resource above.")]

    @server.prompt()
    def test_prompt_with_image() -> list[Message]:
        """An image, and what to do with it."""
        return [UserMessage(_image()), UserMessage("Please analyze the image above.")]
