// The tour of the TypeScript clients: the same steps as tests/clients/python_client.py takes.
// `travel(connect)` reads the ways from stdin, an object of {url | sse | command} by name, takes all of them at once,
// and prints what was seen by the same names. What `connect` has to give is written at `Tourist.#open`.
import { randomUUID } from "node:crypto";
import { createRequire } from "node:module";
import { text } from "node:stream/consumers";

export const MODERN = "2026-07-28";
export const INFO = { name: "tourist", version: "1" };
export const CAPABILITIES = { elicitation: {}, roots: {}, sampling: {} };

const PATIENCE = 30_000;
const UPDATED = "notifications/resources/updated";
const CHANGED = "notifications/tools/list_changed";
const LEGACY_QUESTIONS = {
  test_sampling: { prompt: "well?" },
  test_elicitation: { message: "who?" },
  ask_roots: {},
};
const MODERN_QUESTIONS = {
  test_input_required_result_multiple_inputs: {},
  test_input_required_result_multi_round: {},
  test_missing_capability: {},
};

/** A package of the Node parts; ES modules do not look into folders that the environment names. */
export const part = createRequire(process.env.MCP_NODE_PARTS + "/");

export async function travel(connect) {
  const ways = Object.entries(JSON.parse(await text(process.stdin)));
  const seen = await Promise.all(
    ways.map(async ([name, way]) => [name, await new Tourist(way, connect).travel()]),
  );
  process.stdout.write(JSON.stringify(Object.fromEntries(seen)) + "\n", () => process.exit(0));
}

/** One client at one address, and what it saw there. */
class Tourist {
  #way;
  #connect;
  #key = randomUUID();
  #asked = [];
  #logged = [];
  #events = {};
  #seen = {};

  constructor(way, connect) {
    this.#way = way;
    this.#connect = connect;
  }

  async travel() {
    if (await this.#step("connects", () => this.#all())) {
      await this.#step("connects again", () => this.#again());
    }
    return JSON.parse(JSON.stringify(this.#seen).replaceAll(this.#key, "KEY"));
  }

  /** `connect` gives: client, revision, call(params, options), listen(filter), session(), close(). */
  #open() {
    return this.#connect(this.#way, {
      "sampling/createMessage": (params) => {
        this.#asked.push(params);
        return { role: "assistant", content: { type: "text", text: "Paris" }, model: "none" };
      },
      "elicitation/create": (params) => {
        this.#asked.push(params);
        const fields = Object.keys(params.requestedSchema.properties);
        return { action: "accept", content: Object.fromEntries(fields.map((each) => [each, `my ${each}`])) };
      },
      "roots/list": () => {
        this.#asked.push("roots");
        return { roots: [{ uri: "file:///home", name: "home" }] };
      },
      "notifications/message": (params) => this.#logged.push(params),
      [UPDATED]: ({ uri }) => (this.#events[UPDATED] ??= { uri }),
      [CHANGED]: () => (this.#events[CHANGED] ??= {}),
    });
  }

  async #all() {
    const opened = await this.#open();
    this.#seen.revision = opened.revision;
    for (const [name, step] of Object.entries(this.#steps(opened))) await this.#step(name, step);
    const introduction = this.#introduction(opened.client);
    const session = opened.session();
    await opened.close();
    this.#seen.session = await this.#sessionStatus(session);
    return introduction;
  }

  async #again() {
    const opened = await this.#open();
    const said = await opened.call({ name: "test_simple_text", arguments: {} });
    const seen = [opened.revision, this.#introduction(opened.client), said];
    await opened.close();
    return seen;
  }

  #introduction(client) {
    return {
      server: client.getServerVersion(),
      capabilities: client.getServerCapabilities(),
      instructions: client.getInstructions(),
    };
  }

  async #step(name, step) {
    let timer;
    const late = new Promise((_, reject) => {
      timer = setTimeout(() => reject(new Error("too late")), PATIENCE * (name.startsWith("connects") ? 4 : 1));
    });
    try {
      this.#seen[name] = await Promise.race([step(), late]);
      return true;
    } catch (error) {
      this.#seen[name] = failure(error);
      return false;
    } finally {
      clearTimeout(timer);
    }
  }

  // ── The steps ──

  #steps(opened) {
    const { client, call } = opened;
    const modern = opened.revision === MODERN;
    const calling = (name, args = {}) => () => call({ name, arguments: args });
    const questions = Object.entries(modern ? MODERN_QUESTIONS : LEGACY_QUESTIONS).map(([name, args]) => [
      `asked by ${name}`,
      () => this.#questions(calling(name, args)),
    ]);
    const prompt = () => client.getPrompt({ name: "test_input_required_result_prompt" });
    return {
      tools: () => this.#pages(client),
      prompts: () => client.listPrompts(),
      resources: () => client.listResources(),
      templates: () => client.listResourceTemplates(),
      call: calling("test_multiple_content_types"),
      error: calling("test_error_handling"),
      "unknown tool": calling("no_such_tool"),
      prompt: () => client.getPrompt({ name: "test_prompt_with_arguments", arguments: { arg1: "ä", arg2: "\u2028" } }),
      "unknown prompt": () => client.getPrompt({ name: "no_such_prompt" }),
      resource: () => client.readResource({ uri: "test://template/7/data" }),
      "unknown resource": () => client.readResource({ uri: "test://no-such" }),
      completion: () =>
        client.complete({
          ref: { type: "ref/prompt", name: "test_prompt_with_arguments" },
          argument: { name: "arg1", value: "par" },
        }),
      progress: () => this.#progress(call),
      log: () => this.#log(opened, modern),
      cancel: () => this.#cancel(call),
      events: () => this.#changes(opened, modern),
      polling: calling("test_reconnection"),
      ...Object.fromEntries(questions),
      ...(modern ? { "asked by a prompt": () => this.#questions(prompt) } : {}),
    };
  }

  async #pages(client) {
    const pages = [await client.listTools()];
    while (pages.at(-1).nextCursor) pages.push(await client.listTools({ cursor: pages.at(-1).nextCursor }));
    return pages;
  }

  /** A call that ends when its progress was seen: of what comes at once, not all is told by these clients. */
  async #progress(call) {
    const seen = [];
    const key = `${this.#key} steps`;
    const holding = call({ name: "hold", arguments: { key } }, { onprogress: (progress) => seen.push(progress) });
    const releasing = until(() => seen.length >= 3).then(() => call({ name: "release", arguments: { key } }));
    const [said] = await Promise.all([holding, releasing]);
    return [said, seen];
  }

  async #log({ client, call }, modern) {
    if (!modern) await client.setLoggingLevel("info");
    const _meta = modern ? { "io.modelcontextprotocol/logLevel": "info" } : undefined;
    const said = await call({ name: "test_tool_with_logging", arguments: {}, _meta });
    await until(() => this.#logged.length >= 3);
    return [said, this.#logged];
  }

  async #cancel(call) {
    const controller = new AbortController();
    const options = { signal: controller.signal, onprogress: () => controller.abort("enough") };
    try {
      await call({ name: "hold", arguments: { key: this.#key } }, options);
    } catch (error) {
      if (!controller.signal.aborted) throw error;
    }
    return call({ name: "fate", arguments: { key: this.#key } });
  }

  /** Both kinds of change, however often they have to happen until they are seen. */
  async #changes({ client, call, listen }, modern) {
    const uri = `test://watched/${this.#key}`;
    if (!modern) {
      await client.subscribeResource({ uri });
      await this.#touch(call, uri);
      await client.unsubscribeResource({ uri });
      return this.#events;
    }
    const listening = await listen({ toolsListChanged: true, resourceSubscriptions: [uri] });
    await this.#touch(call, uri);
    await listening.close();
    return { ...this.#events, honored: listening.honoredFilter, closed: await listening.closed };
  }

  async #touch(call, uri) {
    const both = () => UPDATED in this.#events && CHANGED in this.#events;
    while (!both()) {
      await call({ name: "touch", arguments: { uri } });
      await until(both, 500);
    }
  }

  /** What came of it, and what the client was asked meanwhile. */
  async #questions(calling) {
    this.#asked = [];
    const asked = this.#asked;
    try {
      return [await calling(), asked];
    } catch (error) {
      return [failure(error), asked];
    }
  }

  /** The answer to who comes with the session that the client has ended. */
  async #sessionStatus(session) {
    if (!session || !this.#way.url) return null;
    const answer = await fetch(this.#way.url, {
      method: "POST",
      headers: {
        Accept: "application/json, text/event-stream",
        "Content-Type": "application/json",
        "Mcp-Session-Id": session,
      },
      body: JSON.stringify({ jsonrpc: "2.0", id: 1, method: "ping" }),
    });
    await answer.text();
    return answer.status;
  }
}

function failure(error) {
  const { code, message, data } = error;
  return Number.isInteger(code) ? { error: { code, message, data } } : { raises: `${error.name}: ${message}` };
}

async function until(condition, bound = 5_000) {
  const end = Date.now() + bound;
  while (!condition() && Date.now() < end) await new Promise((resolve) => setTimeout(resolve, 10));
}
