{{/* Pods get what the injector itself runs: one image, by digest where there is one. */}}
{{- define "image" -}}
{{- with .Values.image -}}
{{- if .digest }}{{ .repository }}@{{ .digest }}{{ else }}{{ .repository }}:{{ .tag }}{{ end -}}
{{- end -}}
{{- end -}}

{{/* The settings of the injector, as the file that it reads. */}}
{{- define "settings" -}}
{{- toYaml .Values.injector -}}
{{- end -}}

{{/* Named after its content: other settings are another ConfigMap, and so new pods. */}}
{{- define "settings-name" -}}
mcp-opa-sidecar-injector-{{ include "settings" . | sha256sum | trunc 10 }}
{{- end -}}

{{/* What is the same for every webhook: who is not there lets nobody pass. */}}
{{- define "fails-closed" -}}
admissionReviewVersions: [v1]
sideEffects: NoneOnDryRun # Events about pods that are refused
failurePolicy: Fail
matchPolicy: Equivalent
timeoutSeconds: 5
{{- end -}}

{{/* Where a webhook is reached, by its path, and who is believed to be it. */}}
{{- define "client" -}}
service:
  name: mcp-opa-sidecar-injector
  namespace: {{ .root.Values.namespace.name }}
  path: {{ .path }}
  port: 443
{{- if eq .root.Values.certificates.source "secret" }}
caBundle: {{ required "certificates.caBundle: base64 of the PEM that the Secret's certificate is checked by" .root.Values.certificates.caBundle }}
{{- end }}
{{- end -}}

{{/* Who fills `caBundle` in, where that is cert-manager. */}}
{{- define "authority" -}}
{{- if eq .Values.certificates.source "certManager" -}}
annotations:
  cert-manager.io/inject-ca-from: {{ .Values.namespace.name }}/mcp-opa-sidecar-injector
{{- end -}}
{{- end -}}

{{/* Whether it makes its certificates itself. */}}
{{- define "self-signed" -}}
{{- if eq .Values.certificates.source "selfSigned" }}true{{ end -}}
{{- end -}}

{{/* Whether it sends Events: it does unless it is told not to. */}}
{{- define "events" -}}
{{- if ne (toString .Values.injector.events) "false" }}true{{ end -}}
{{- end -}}

{{/* Whether it speaks with the API server, and so has a token and a way out. */}}
{{- define "speaks" -}}
{{- or (include "self-signed" .) (include "events" .) -}}
{{- end -}}

{{/* Namespaces about which nobody is ever asked. */}}
{{- define "elsewhere" -}}
- key: kubernetes.io/metadata.name
  operator: NotIn
  values: {{ append .Values.excludedNamespaces .Values.namespace.name | toJson }}
{{- end -}}

{{/* The pods of namespaces that ask for injection, unless they have a label of their own. */}}
{{- define "of-enabled-namespaces" -}}
namespaceSelector:
  matchExpressions:
    - key: mcp-opa-sidecar.io/injection
      operator: In
      values: [enabled]
    {{- include "elsewhere" . | nindent 4 }}
objectSelector:
  matchExpressions:
    - key: mcp-opa-sidecar.io/inject
      operator: NotIn
      values: ['true', 'false']
{{- end -}}

{{/* The pods that ask for it themselves. */}}
{{- define "labelled" -}}
namespaceSelector:
  matchExpressions:
    {{- include "elsewhere" . | nindent 4 }}
objectSelector:
  matchLabels:
    mcp-opa-sidecar.io/inject: 'true'
{{- end -}}

{{/* The pods that were injected, wherever they are. */}}
{{- define "injected" -}}
namespaceSelector:
  matchExpressions:
    {{- include "elsewhere" . | nindent 4 }}
objectSelector:
  matchExpressions:
    - key: mcp-opa-sidecar.io/injected
      operator: Exists
{{- end -}}

{{/* A rule about pods: operation and resources. */}}
{{- define "rule" -}}
- operations: [{{ .operation }}]
  apiGroups: ['']
  apiVersions: [v1]
  resources: {{ .resources | toJson }}
  scope: Namespaced
{{- end -}}
