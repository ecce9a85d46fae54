"""mcp-opa-sidecar: between an MCP client and an MCP server, it lets a policy decide each action.

::

    bytes      a transport takes them in (`transport.stdio`, `transport.http` with `transport.sse`)
    Message    `protocol.jsonrpc.decode` reads them, strictly
    Operation  `protocol.session` says what is being tried, by the table `protocol.methods`
    Actor      `policy.identity`: who, on whose behalf, and how sure we are
    input      `policy.document` writes the question, version 1
    Decision   OPA answers it (`opa`); `policy.decision` reads the answer, strictly
    Outcome    `policy.enforcement` turns it into Forward, Reply or Drop
    Call       `telemetry` makes spans of it and `audit` a record

`pipeline` is the one coroutine that knows this order, `conversation` what lasts from one message to
the next. A server's messages take the same road back. When the policy changes, `rechecking` asks
again about whatever is open, and `relisting` about what clients were shown.

Two rules hold everywhere. Only a `Permitted` is ever sent to a server, and only
`policy.enforcement` makes one. And what is not a clean "allow" (no answer, a late one, one that is
not understood) is a deny.

Layers, top to bottom, each knowing only those below (import-linter checks it)::

    cli  >  feed  >  transport | opa | keys | telemetry | audit | logs | injector
         >  pipeline | config | reviewing  >  rechecking | relisting
         >  due | learning | judging | limits | recording  >  conversation  >  offers
         >  policy  >  protocol  >  errors | shim
"""

__version__ = "0.1.0"
