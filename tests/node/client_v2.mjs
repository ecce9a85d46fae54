// The tour with version 2 of the TypeScript SDK: MCP_NODE_PARTS=FOLDER node client_v2.mjs legacy|auto|REVISION < ways
import { CAPABILITIES, INFO, part, travel } from "./tour.mjs";

const { Client, SSEClientTransport, StreamableHTTPClientTransport } = part("@modelcontextprotocol/client");
const { StdioClientTransport } = part("@modelcontextprotocol/client/stdio");

const wanted = process.argv[2];
const mode = ["legacy", "auto"].includes(wanted) ? wanted : { pin: wanted };

function transportOf({ command, sse, url }) {
  if (command) return new StdioClientTransport({ command: command[0], args: command.slice(1), env: process.env });
  return sse ? new SSEClientTransport(new URL(sse)) : new StreamableHTTPClientTransport(new URL(url));
}

async function connect(way, handlers) {
  const client = new Client(INFO, { capabilities: CAPABILITIES, versionNegotiation: { mode } });
  for (const [method, handle] of Object.entries(handlers)) {
    const set = method.startsWith("notifications/") ? "setNotificationHandler" : "setRequestHandler";
    client[set](method, ({ params }) => handle(params));
  }
  const transport = transportOf(way);
  await client.connect(transport);
  return {
    client,
    revision: client.getNegotiatedProtocolVersion(),
    call: (params, options) => client.callTool(params, options),
    listen: (filter) => client.listen(filter),
    session: () => transport.sessionId,
    close: async () => {
      await transport.terminateSession?.();
      await client.close();
    },
  };
}

await travel(connect);
