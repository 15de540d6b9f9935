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
  restartPolicy: Never
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
