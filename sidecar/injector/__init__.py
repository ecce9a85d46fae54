"""The sidecar's way into a pod. One pure function, `plan`, under every face.

::

    plan        plan(pod, namespace, injection) -> pod: idempotent; refuses with a reason
      ├── wishes      what labels and annotations ask for: a Wish, or the reason why it is none
      ├── modes       ways to stand before a server, each a `Mode`: front, redirect, stdio, client
      ├── walls       what a pod may never bring, since it would lead around the sidecar
      ├── containers  ours: the sidecar, and with it `opa`; `parts` is what all of them have alike
      ├── bundles     a policy that OPA fetches, signed, and what is revoked
      ├── probes      the kubelet's questions to a server that only answers on loopback
      └── changes     what is changed of others', and how it is taken back
    firewall    the rules of mode redirect, as text
    verify      whether a pod, as somebody wants to have it, is what a plan makes of some pod
    admission   reviews of the API server, answered by both; `patch` says what changed
      ├── webhook     the same, served and counted: `metrics`
      └── events      refusals, told to whoever looks at the workload
    keeping     a certificate that the injector makes itself, shared by all replicas
      ├── rotation      what is due, given what there is and the time
      ├── certificates  authorities and certificates, and how a Secret keeps them
      └── cluster       the API server, for certificates and Events
    manifests   streams of YAML, of which only what is injected changes a byte
      └── workloads   where the pods are in a Deployment, a CronJob, a List
    injection   the settings: what is injected, and what only the operator may choose

Pods are the plain JSON of the API. What is injected already is never believed for its name or an
annotation: it is taken off, planned anew and compared.
"""
