{{/* What Serve runs: serve.yaml with the release's own values. */}}
{{- define "segcore.serve" -}}
{{- $serve := .Files.Get "serve.yaml" | fromYaml }}
{{- $own := dict "fronts" (int .Values.front.replicas) "sessions" (printf "redis://%s-store-redis:6379/0" .Release.Name) }}
{{- $application := index $serve.applications 0 }}
{{- $args := $application.args }}
{{- if not .Values.secrets.tls }}
{{- $args = omit $args "tls_certificate" "tls_key" }}
{{- end }}
{{- if not .Values.secrets.tenants }}
{{- $args = omit $args "tenants" }}
{{- end }}
{{- $_ := set $application "args" (mergeOverwrite $args $own .Values.serve) }}
{{- toYaml $serve }}
{{- end }}

{{/* The Ray cluster of a release, whatever runs on it: a RayCluster's spec. */}}
{{- define "segcore.cluster" -}}
{{- $service := eq .Values.run "service" -}}
rayVersion: "2.60.0"
authOptions: {mode: token}
enableInTreeAutoscaling: true
autoscalerOptions:
  version: v2
  idleTimeoutSeconds: 60
  securityContext: {{- include "segcore.containerSecurity" . | nindent 4 }}
  resources:
    requests: {cpu: 200m, memory: 512Mi}
    limits: {cpu: 500m, memory: 512Mi}
  volumeMounts: [{name: tmp, mountPath: /tmp}]
gcsFaultToleranceOptions:
  redisAddress: {{ .Release.Name }}-gcs-redis:6379
  redisPassword:
    valueFrom: {secretKeyRef: {name: {{ .Values.secrets.redis }}, key: password}}
headGroupSpec:
  rayStartParams: {num-cpus: "0", dashboard-host: 0.0.0.0}
  template: {{- include "segcore.pod" (list . "head" .Values.head.resources) | nindent 4 }}
workerGroupSpecs:
  {{- if $service }}
  - groupName: front
    replicas: {{ .Values.front.replicas }}
    minReplicas: {{ .Values.front.replicas }}
    maxReplicas: {{ .Values.front.replicas }}
    rayStartParams: {resources: {{ "\"{\\\"front\\\": 1}\"" | quote }}}
    template: {{- include "segcore.pod" (list . "front" .Values.front.resources) | nindent 6 }}
  {{- end }}
  - groupName: engine
    replicas: {{ .Values.engine.minReplicas }}
    minReplicas: {{ .Values.engine.minReplicas }}
    maxReplicas: {{ .Values.engine.maxReplicas }}
    rayStartParams: {resources: {{ "\"{\\\"engine\\\": 1}\"" | quote }}}
    template: {{- include "segcore.pod" (list . "engine" (merge (dict "gpus" .Values.engine.gpus) .Values.engine.resources)) | nindent 6 }}
{{- end }}

{{/* A node of that cluster: (list $ "head" | "front" | "engine" resources). */}}
{{- define "segcore.pod" -}}
{{- $ := index . 0 }}{{ $component := index . 1 }}{{ $resources := index . 2 -}}
metadata:
  labels: {{- include "segcore.labels" (list $ $component) | nindent 4 }}
spec:
  {{- if ne $component "head" }}
  {{- if $.Values.operator }}
  restartPolicy: Never
  {{- end }}
  {{- end }}
  {{- if or (ne $component "head") (not $.Values.operator) }}
  automountServiceAccountToken: false
  {{- end }}
  securityContext: {{- include "segcore.podSecurity" $ | nindent 4 }}
  # Longer than the longest that a replica may take to end its calls.
  terminationGracePeriodSeconds: 120
  affinity:
    podAntiAffinity:
      preferredDuringSchedulingIgnoredDuringExecution:
        - weight: 100
          podAffinityTerm:
            topologyKey: kubernetes.io/hostname
            labelSelector: {matchLabels: {{ include "segcore.selector" (list $ $component) }}}
  {{- if eq $component "engine" }}
  {{- with $.Values.engine.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if $.Values.engine.gpus }}
  tolerations: [{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]
  {{- end }}
  {{- end }}
  containers:
    - name: ray-{{ ternary "head" "worker" (eq $component "head") }}
      image: {{ include "segcore.image" $ }}
      imagePullPolicy: {{ $.Values.image.pullPolicy }}
      {{- if not $.Values.operator }}
      {{- include "segcore.start" (list $ $component) | nindent 6 }}
      {{- end }}
      securityContext: {{- include "segcore.containerSecurity" $ | nindent 8 }}
      resources: {{- include "segcore.resources" $resources | nindent 8 }}
      ports:
        - {name: metrics, containerPort: 8080}
        {{- if eq $component "head" }}
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        - {name: client, containerPort: 10001}
        {{- end }}
        {{- if eq $component "front" }}
        - {name: serve-grpc, containerPort: 9100}
        - {name: openai, containerPort: 8100}
        {{- end }}
      {{- if eq $component "front" }}
      # Clients are sent here while engines answer it.
      readinessProbe:
        httpGet: {path: /healthz, port: openai, scheme: {{ ternary "HTTPS" "HTTP" (ne $.Values.secrets.tls "") }}}
        timeoutSeconds: 5
        periodSeconds: 5
        failureThreshold: 2
      {{- end }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: shm, mountPath: /dev/shm}
        - {name: cache, mountPath: /cache}
        - {name: shared, mountPath: /shared}
        {{- if and $.Values.config (eq $component "head") }}
        - {name: run, mountPath: /etc/segcore/run, readOnly: true}
        {{- end }}
        {{- range $name := list "redis" "tls" "tenants" }}
        {{- if index $.Values.secrets $name }}
        - {name: {{ $name }}, mountPath: /etc/segcore/{{ $name }}, readOnly: true}
        {{- end }}
        {{- end }}
  volumes:
    - {name: tmp, emptyDir: {}}
    - {name: shm, emptyDir: {medium: Memory, sizeLimit: 1Gi}}
    {{- with $.Values.engine.cache }}
    {{- if and .storageClass (eq $component "engine") }}
    - name: cache
      ephemeral:
        volumeClaimTemplate:
          spec:
            accessModes: [ReadWriteOnce]
            storageClassName: {{ .storageClass }}
            resources: {requests: {storage: {{ .size }}}}
    {{- else }}
    - {name: cache, emptyDir: {sizeLimit: {{ .size }}}}
    {{- end }}
    {{- end }}
    - {name: shared, persistentVolumeClaim: {claimName: {{ $.Release.Name }}-shared}}
    {{- if and $.Values.config (eq $component "head") }}
    - {name: run, configMap: {name: {{ $.Release.Name }}-run}}
    {{- end }}
    {{- range $name := list "redis" "tls" "tenants" }}
    {{- if index $.Values.secrets $name }}
    - {name: {{ $name }}, secret: {secretName: {{ index $.Values.secrets $name }}, defaultMode: 288}}
    {{- end }}
    {{- end }}
{{- end }}

{{/* What KubeRay would add to a node: how it starts, its token, and whether it is alive. */}}
{{- define "segcore.start" -}}
{{- $ := index . 0 }}{{ $component := index . 1 -}}
command: [ray, start, --block]
args:
  - --metrics-export-port=8080
  {{- if eq $component "head" }}
  - --head
  - --num-cpus=0
  - --dashboard-host=0.0.0.0
  - --redis-password=$(REDIS_PASSWORD)
  {{- else }}
  - --address={{ $.Release.Name }}-head:6379
  - {{ printf "--resources={\"%s\": 1}" $component | squote }}
  {{- end }}
env:
  {{- include "segcore.token" $ | nindent 2 }}
  {{- if eq $component "head" }}
  - {name: RAY_REDIS_ADDRESS, value: "{{ $.Release.Name }}-gcs-redis:6379"}
  - name: REDIS_PASSWORD
    valueFrom: {secretKeyRef: {name: {{ $.Values.secrets.redis }}, key: password}}
  {{- end }}
livenessProbe:
  exec:
    command: [wget, --tries=1, -T4, -qO-, "http://127.0.0.1:{{ ternary "8265/api/gcs_healthz" "52365/api/local_raylet_healthz" (eq $component "head") }}"]
  initialDelaySeconds: 120
  timeoutSeconds: 5
  failureThreshold: 12
{{- end }}

{{- define "segcore.token" -}}
- {name: RAY_AUTH_MODE, value: token}
- name: RAY_AUTH_TOKEN
  valueFrom: {secretKeyRef: {name: {{ required "without the operator, secrets.ray holds Ray's token" .Values.secrets.ray }}, key: auth_token}}
{{- end }}
