// What a server was made to do, a line of JSON each, before it is answered; and where it listens.

import { appendFileSync } from "node:fs";
import { createRequire } from "node:module";

// ES modules do not honour NODE_PATH: the folder of the packages comes by the environment.
export const require = createRequire(`${process.env.MCP_NODE_PARTS}/`);

const [log, transport = "stdio"] = process.argv.slice(2);
export { transport };

export const TOOLS = ["echo", "danger"].map((name) => ({
  name,
  description: name,
  inputSchema: { type: "object" },
}));

// Every method that acts, and the answer that pleases its schema.
export const ACTING = {
  "tools/call": { content: [{ type: "text", text: "done" }] },
  "resources/read": { contents: [{ uri: "danger://x", text: "read" }] },
  "prompts/get": { messages: [] },
  "completion/complete": { completion: { values: [] } },
  "resources/subscribe": {},
  "resources/unsubscribe": {},
};

export const CAPABILITIES = {
  tools: {},
  prompts: {},
  completions: {},
  resources: { subscribe: true },
};

export function saw(request) {
  const params = request.params ?? {};
  const name = params.name ?? params.uri ?? "-";
  const record = { what: "message", method: request.method, name, arguments: params.arguments };
  appendFileSync(log, `${JSON.stringify(record)}\n`);
}

export function listen(server, path) {
  server.listen(0, "127.0.0.1", () => {
    console.error(`listening on http://127.0.0.1:${server.address().port}${path}`);
  });
  process.on("SIGTERM", () => process.exit(0));
}
