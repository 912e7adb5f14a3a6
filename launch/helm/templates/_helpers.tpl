{{/* A name that a service may have: it begins with a letter and has no dots, which a release's may not and may. */}}
{{- define "skyrl.fullname" -}}
{{- regexReplaceAll "^([^a-z])" (replace "." "-" .Release.Name) "skyrl-${1}" | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "skyrl.labels" -}}
app.kubernetes.io/name: skyrl
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "skyrl.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{- define "skyrl.claim" -}}
{{ .Values.runs.claim | default (printf "%s-runs" (include "skyrl.fullname" .)) }}
{{- end -}}

{{/* What every pod of skyrl has: user, volumes, secrets. */}}
{{- define "skyrl.pod" -}}
automountServiceAccountToken: false
securityContext:
  runAsNonRoot: true
  runAsUser: {{ int64 .Values.securityContext.runAsUser }}
  runAsGroup: {{ int64 .Values.securityContext.runAsGroup }}
  fsGroup: {{ int64 .Values.securityContext.fsGroup }}
  # Without it a volume of many checkpoints is walked through at each start.
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "skyrl.volumes" -}}
- name: runs
  persistentVolumeClaim: {claimName: {{ include "skyrl.claim" . | quote }}}
- name: tmp
  emptyDir: {}
{{- range .Values.volumes }}
- name: {{ .name | quote }}
  persistentVolumeClaim: {claimName: {{ .claim | quote }}, readOnly: {{ .readOnly | default false }}}
{{- end }}
{{- end -}}

{{- define "skyrl.mounts" -}}
- {name: runs, mountPath: {{ .Values.runs.path }}}
- {name: tmp, mountPath: /tmp}
{{- range .Values.volumes }}
- {name: {{ .name | quote }}, mountPath: {{ .path }}, readOnly: {{ .readOnly | default false }}}
{{- end }}
{{- end -}}

{{- define "skyrl.container" -}}
image: {{ include "skyrl.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  capabilities: {drop: [ALL]}
{{- with .Values.secrets }}
envFrom:
{{- range . }}
  - secretRef: {name: {{ . | quote }}}
{{- end }}
{{- end }}
{{- end -}}

{{- define "skyrl.env" -}}
- {name: HOME, value: /tmp}
{{- if not .Values.online }}
- {name: HF_HUB_OFFLINE, value: "1"}
- {name: TRANSFORMERS_OFFLINE, value: "1"}
{{- end }}
{{- range $name, $value := .Values.env }}
{{- /* A number of a values file has no kind of its own, and from a million on would be written 1e+06. */}}
{{- if and (kindIs "float64" $value) (eq $value (floor $value)) }}{{ $value = int64 $value }}{{ end }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- end -}}

{{/* The pod of a training job; its node's rank is the index of its completion. */}}
{{- define "skyrl.train.pod" -}}
{{- $name := printf "%s-train" (include "skyrl.fullname" .) -}}
{{- $head := ternary (printf "%s-ranks-0-0.%s" $name $name) (printf "%s-0.%s" $name $name) (eq .Values.train.kind "JobSet") -}}
metadata:
  labels:
    {{- include "skyrl.labels" . | nindent 4 }}
    app.kubernetes.io/component: train
  {{- with .Values.train.annotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- include "skyrl.pod" . | nindent 2 }}
  restartPolicy: Never
  subdomain: {{ $name }}
  terminationGracePeriodSeconds: {{ .Values.train.graceSeconds }}
  {{- with .Values.train.priorityClass }}
  priorityClassName: {{ . | quote }}
  {{- end }}
  {{- with .Values.train.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.train.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  volumes:
    {{- include "skyrl.volumes" . | nindent 4 }}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ .Values.train.sharedMemory }}}
  containers:
    - name: train
      {{- include "skyrl.container" . | nindent 6 }}
      command:
        - torchrun
        - --nnodes={{ .Values.train.nodes }}
        - --node-rank=$(JOB_COMPLETION_INDEX)
        - --master-addr={{ $head }}
        - --master-port=29500
        - --rdzv-conf=timeout=600 # seconds until nodes that do not meet are an error
        - --nproc-per-node={{ .Values.train.gpus | default .Values.train.ranks }}
        - -m
        - skyrl.train
      args:
        - run.dir={{ .Values.runs.path }}/{{ .Values.train.name }}
        {{- range .Values.train.options }}
        - {{ . | quote }}
        {{- end }}
      workingDir: {{ .Values.runs.path }}
      env:
        {{- include "skyrl.env" . | nindent 8 }}
        # torchrun kills its ranks this long after it has passed SIGTERM on: they save meanwhile.
        - {name: TORCH_ELASTIC_SHUTDOWN_TIMEOUT, value: {{ sub .Values.train.graceSeconds 15 | quote }}}
      ports:
        - {name: rendezvous, containerPort: 29500}
      resources:
        {{- $resources := deepCopy .Values.train.resources }}
        {{- if .Values.train.gpus }}
        {{- $_ := set $resources "limits" (merge (dict .Values.train.gpuResource .Values.train.gpus) ($resources.limits | default dict)) }}
        {{- end }}
        {{- toYaml $resources | nindent 8 }}
      volumeMounts:
        {{- include "skyrl.mounts" . | nindent 8 }}
        - {name: shm, mountPath: /dev/shm}
{{- end -}}

{{/* Kueue or the window has the say from the second release on: an upgrade would stop what runs until the next window. */}}
{{- define "skyrl.train.suspend" -}}
{{- $name := printf "%s-train" (include "skyrl.fullname" .) -}}
{{- $api := ternary "jobset.x-k8s.io/v1alpha2" "batch/v1" (eq .Values.train.kind "JobSet") -}}
{{- $asked := or (not (empty .Values.train.queue)) .Values.train.offPeak.enabled -}}
{{- $suspend := $asked -}}
{{- if and $asked .Release.IsUpgrade -}}
{{- $live := lookup $api .Values.train.kind .Release.Namespace $name -}}
{{- $window := lookup "batch/v1" "CronJob" .Release.Namespace (printf "%s-begin" $name) -}}
{{- $queue := dig "metadata" "labels" "kueue.x-k8s.io/queue-name" "" ($live | default dict) -}}
{{- if and $live (or $window $queue) -}}
{{- $suspend = dig "spec" "suspend" false $live -}}
{{- end -}}
{{- end -}}
{{- $suspend -}}
{{- end -}}

{{- define "skyrl.train.job" -}}
completionMode: Indexed
completions: {{ .Values.train.nodes }}
parallelism: {{ .Values.train.nodes }}
backoffLimit: {{ .Values.train.retries }}
# A new pod waits until the old one is gone: it would find the run's folder locked.
podReplacementPolicy: Failed
podFailurePolicy:
  rules:
    - action: Ignore # preempted, evicted, drained: the next pod goes on from the checkpoint
      onPodConditions: [{type: DisruptionTarget, status: "True"}]
    - action: Ignore # asked to stop, and saved
      onExitCodes: {containerName: train, operator: In, values: [75]}
    - action: FailJob # an option that cannot work does not work the next time either; 130: skyrl-tx stop
      onExitCodes: {containerName: train, operator: In, values: [2, 130]}
template:
  {{- include "skyrl.train.pod" . | nindent 2 }}
{{- end -}}
