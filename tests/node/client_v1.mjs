// The tour with version 1 of the TypeScript SDK: MCP_NODE_PARTS=FOLDER node client_v1.mjs REVISION < ways
import { CAPABILITIES, INFO, part, travel } from "./tour.mjs";

const types = part("@modelcontextprotocol/sdk/types.js");
const { Client } = part("@modelcontextprotocol/sdk/client/index.js");
const { SSEClientTransport } = part("@modelcontextprotocol/sdk/client/sse.js");
const { StdioClientTransport } = part("@modelcontextprotocol/sdk/client/stdio.js");
const { StreamableHTTPClientTransport } = part("@modelcontextprotocol/sdk/client/streamableHttp.js");

// It offers its newest revision and no option to offer another one.
types.LATEST_PROTOCOL_VERSION = process.argv[2];

const SCHEMAS = {
  "sampling/createMessage": types.CreateMessageRequestSchema,
  "elicitation/create": types.ElicitRequestSchema,
  "roots/list": types.ListRootsRequestSchema,
  "notifications/message": types.LoggingMessageNotificationSchema,
  "notifications/resources/updated": types.ResourceUpdatedNotificationSchema,
  "notifications/tools/list_changed": types.ToolListChangedNotificationSchema,
};

function transportOf({ command, sse, url }) {
  if (command) return new StdioClientTransport({ command: command[0], args: command.slice(1), env: process.env });
  return sse ? new SSEClientTransport(new URL(sse)) : new StreamableHTTPClientTransport(new URL(url));
}

async function connect(way, handlers) {
  const client = new Client(INFO, { capabilities: CAPABILITIES });
  for (const [method, handle] of Object.entries(handlers)) {
    const set = method.startsWith("notifications/") ? "setNotificationHandler" : "setRequestHandler";
    client[set](SCHEMAS[method], ({ params }) => handle(params));
  }
  const transport = transportOf(way);
  let revision;
  const keep = transport.setProtocolVersion?.bind(transport);
  transport.setProtocolVersion = (version) => {
    revision = version;
    keep?.(version);
  };
  await client.connect(transport);
  return {
    client,
    revision,
    call: (params, options) => client.callTool(params, undefined, options),
    session: () => transport.sessionId,
    close: async () => {
      await transport.terminateSession?.();
      await client.close();
    },
  };
}

await travel(connect);
