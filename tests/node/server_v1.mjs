// A server on the TypeScript SDK v1, with the express application and the sessions of its own
// examples: node server_v1.mjs LOG [stdio|http|sse]

import { randomUUID } from "node:crypto";
import { createServer } from "node:http";
import { ACTING, CAPABILITIES, TOOLS, listen, require, saw, transport } from "./witness.mjs";

const { Server } = require("@modelcontextprotocol/sdk/server/index.js");
const { StdioServerTransport } = require("@modelcontextprotocol/sdk/server/stdio.js");
const types = require("@modelcontextprotocol/sdk/types.js");

const SCHEMAS = {
  "tools/call": types.CallToolRequestSchema,
  "resources/read": types.ReadResourceRequestSchema,
  "prompts/get": types.GetPromptRequestSchema,
  "completion/complete": types.CompleteRequestSchema,
  "resources/subscribe": types.SubscribeRequestSchema,
  "resources/unsubscribe": types.UnsubscribeRequestSchema,
};

function build() {
  const server = new Server({ name: "v1", version: "1" }, { capabilities: CAPABILITIES });
  server.setRequestHandler(types.ListToolsRequestSchema, () => ({ tools: TOOLS }));
  for (const [method, schema] of Object.entries(SCHEMAS)) {
    server.setRequestHandler(schema, (request) => {
      saw(request);
      return ACTING[method];
    });
  }
  return server;
}

function streamable() {
  const { createMcpExpressApp } = require("@modelcontextprotocol/sdk/server/express.js");
  const http = require("@modelcontextprotocol/sdk/server/streamableHttp.js");
  const sessions = new Map();
  const app = createMcpExpressApp();
  app.all("/mcp", async (request, response) => {
    let session = sessions.get(request.headers["mcp-session-id"]);
    if (session === undefined && types.isInitializeRequest(request.body)) {
      session = new http.StreamableHTTPServerTransport({
        sessionIdGenerator: randomUUID,
        onsessioninitialized: (id) => sessions.set(id, session),
      });
      session.onclose = () => sessions.delete(session.sessionId);
      await build().connect(session);
    }
    if (session === undefined) {
      response.status(request.headers["mcp-session-id"] ? 404 : 400).send("no session");
      return;
    }
    await session.handleRequest(request, response, request.body);
  });
  return app;
}

function events() {
  const { SSEServerTransport } = require("@modelcontextprotocol/sdk/server/sse.js");
  const express = require("express");
  const sessions = new Map();
  const app = express();
  app.get("/sse", async (_, response) => {
    const session = new SSEServerTransport("/messages", response);
    sessions.set(session.sessionId, session);
    response.on("close", () => sessions.delete(session.sessionId));
    await build().connect(session);
  });
  app.post("/messages", async (request, response) => {
    const session = sessions.get(request.query.sessionId);
    if (session === undefined) {
      response.status(404).send("no session");
      return;
    }
    await session.handlePostMessage(request, response);
  });
  return app;
}

if (transport === "stdio") {
  await build().connect(new StdioServerTransport());
} else if (transport === "sse") {
  listen(createServer(events()), "/sse");
} else {
  listen(createServer(streamable()), "/mcp");
}
