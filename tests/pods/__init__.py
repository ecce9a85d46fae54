"""Injected pods that run: a kubelet's work done with processes in a network namespace of their own.

::

    runner       Pod: starts containers in order, probes, restarts and ends them as a kubelet does
      ├── spec        what of a pod is followed, what is taken note of; anything else is an error
      ├── container   one process in namespaces of its own: its image's files, its mounts, its user
      ├── volumes     emptyDir, configMap (`..data`, swapped atomically), downwardAPI
      └── network     a pod's address, and the outside from which clients and probes come
    image        the steps of the Dockerfile done by hand: what stands for the sidecar's image
    app          a real MCP server as pods have it, also one that does not do as it is told
"""
