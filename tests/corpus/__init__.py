"""Every known way to have something done unjudged, as bytes; what must come of it is: nothing.

The cases are the YAML files, `items.yaml` says what they have to cover. `cases` reads them, `roads`
says how one travels, `places` who stands at the end, and `runner` looks at what was executed.
"""
