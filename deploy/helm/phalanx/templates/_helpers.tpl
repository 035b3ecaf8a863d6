{{- define "phalanx.name" -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- end }}

{{/* Not by app.kubernetes.io/name: KubeRay selects the pods of a RayCluster by its own value of it. */}}
{{- define "phalanx.selector" -}}
app.kubernetes.io/part-of: phalanx
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "phalanx.labels" -}}
{{ include "phalanx.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "phalanx.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "phalanx.tlsSecret" -}}
{{ .Values.security.tlsSecret | default (printf "%s-tls" (include "phalanx.name" .)) }}
{{- end }}

{{- define "phalanx.clientSecret" -}}
{{ .Values.security.clientSecret | default (printf "%s-client-tls" (include "phalanx.name" .)) }}
{{- end }}

{{- define "phalanx.isRay" -}}
{{- if eq .Values.topology "raycluster" }}true{{ end }}
{{- end }}

{{- define "phalanx.ranks" -}}
{{ mul (.Values.config.tp | default 1) (.Values.config.pp | default 1) (.Values.config.replicas | default 1) }}
{{- end }}

{{/* CPU threads of a rank: a pod's cores divided by its ranks. Ray would count the node's cores. */}}
{{- define "phalanx.threads" -}}
{{- if include "phalanx.isRay" . -}}
{{ max 1 (div .Values.resources.worker.cpu .Values.raycluster.ranksPerWorker) }}
{{- else -}}
{{ max 1 (div .Values.resources.server.cpu (include "phalanx.ranks" . | int)) }}
{{- end -}}
{{- end }}

{{- define "phalanx.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "phalanx.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* What schedules every pod. */}}
{{- define "phalanx.scheduling" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end }}

{{- define "phalanx.mounts" -}}
- {name: temporary, mountPath: /tmp}
- {name: shared-memory, mountPath: /dev/shm}
{{- if .Values.modelVolume }}
- {name: models, mountPath: /models, readOnly: true}
{{- end }}
{{- end }}

{{- define "phalanx.volumes" -}}
- name: temporary
  emptyDir:
    sizeLimit: {{ .Values.temporary }}
# Counts towards the container's memory.
- name: shared-memory
  emptyDir:
    medium: Memory
    sizeLimit: {{ .Values.sharedMemory }}
{{- with .Values.modelVolume }}
- name: models
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* The token of Ray's own ports, which KubeRay makes and names after the cluster. */}}
{{- define "phalanx.rayEnvironment" -}}
- name: RAY_AUTH_MODE
  value: token
- name: RAY_AUTH_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ include "phalanx.name" . }}
      key: auth_token
{{- end }}

{{/* Of a Ray container. Kubelet reaches it from the node, which NetworkPolicy lets through. */}}
{{- define "phalanx.rayProbes" -}}
startupProbe:
  tcpSocket: {port: {{ . }}}
  periodSeconds: 5
  failureThreshold: 60
livenessProbe:
  tcpSocket: {port: {{ . }}}
  periodSeconds: 10
  failureThreshold: 6
readinessProbe:
  tcpSocket: {port: {{ . }}}
  periodSeconds: 10
  failureThreshold: 2
{{- end }}
