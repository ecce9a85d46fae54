// A server on the TypeScript SDK v2, which serves both eras on one endpoint:
// node server_v2.mjs LOG [stdio|http]

import { createServer } from "node:http";
import { ACTING, CAPABILITIES, TOOLS, listen, require, saw, transport } from "./witness.mjs";

const { Server, createMcpHandler } = require("@modelcontextprotocol/server");

function build() {
  const server = new Server({ name: "v2", version: "1" }, { capabilities: CAPABILITIES });
  server.setRequestHandler("tools/list", () => ({ tools: TOOLS }));
  for (const [method, result] of Object.entries(ACTING)) {
    server.setRequestHandler(method, (request) => {
      saw(request);
      return result;
    });
  }
  return server;
}

if (transport === "stdio") {
  const { serveStdio } = require("@modelcontextprotocol/server/stdio");
  serveStdio(build);
} else {
  const { toNodeHandler } = require("@modelcontextprotocol/node");
  listen(createServer(toNodeHandler(createMcpHandler(build))), "/mcp");
}
