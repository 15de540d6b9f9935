{{- define "segcore.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag }}
{{- end }}

{{/* Labels of one component of a release: (list $ "front"). */}}
{{- define "segcore.labels" -}}
app.kubernetes.io/name: segcore
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* The same as a selector, in one line. */}}
{{- define "segcore.selector" -}}
{{ include "segcore.labels" . | fromYaml | toJson }}
{{- end }}

{{- define "segcore.podSecurity" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
fsGroup: 1000
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "segcore.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* The same requests and limits: (dict "cpu" ... "memory" ... "gpus" n). Ray takes what it may use from the limits. */}}
{{- define "segcore.resources" -}}
{{- range $kind := list "requests" "limits" }}
{{ $kind }}:
  cpu: {{ $.cpu | quote }}
  memory: {{ $.memory }}
  {{- if $.gpus }}
  nvidia.com/gpu: {{ $.gpus }}
  {{- end }}
{{- end }}
{{- end }}
