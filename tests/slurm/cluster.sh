#!/usr/bin/env bash
# A real Slurm of several nodes on one machine, for tests: no systemd, no cgroups, no accounting. Each node has a network,
# a host name and a disk (DIR/local) of its own. Host names do not resolve, as on many clusters. Root.
#
#   cluster.sh install         Debian's or Ubuntu's packages
#   cluster.sh start           a munged, a slurmctld, and one slurmd a node; prints what to export
#   cluster.sh stop            ends what start has started, and nothing else
#   cluster.sh run COMMAND...  starts SLURM_TEST_CLUSTERS (1) of them, COMMAND with the first one's SLURM_CONF, and stops
#                              them; exits as COMMAND did
#   cluster.sh cut|mend K      takes node K off the network, and puts it back
#   cluster.sh on K COMMAND... COMMAND in the network of node K
#
# SLURM_TEST_NUMBER (0; of a cluster, several may run side by side: its network is 10.77.<number>, nodes are .10, .11, ...,
# the controller .1), SLURM_TEST_DIR (state, logs, sockets; /tmp/skyrl-slurm-<uid>, to which the number is added),
# SLURM_TEST_NODES (3), SLURM_TEST_CPUS (4; what each node claims to have), SLURM_TEST_GPUS ("4 4 1", of the nodes in
# turn: counted, not there), SLURM_TEST_PLUGSTACK (a plugstack.conf, as pyxis comes with one; none).
set -euo pipefail

NUMBER=${SLURM_TEST_NUMBER:-0}
DIR=${SLURM_TEST_DIR:-/tmp/skyrl-slurm-$(id -u)}-$NUMBER
NODES=${SLURM_TEST_NODES:-3}
CPUS=${SLURM_TEST_CPUS:-4}
read -ra GPUS <<<"${SLURM_TEST_GPUS-4 4 1}"
PORT=$((26817 + 2 * NUMBER)) # this one and the next
NET=10.77.$NUMBER
NAME=skyrl$NUMBER
CONF=$DIR/slurm.conf

# The daemons live in sbin, which is not on everybody's path.
PATH=$PATH:/usr/sbin:/sbin

say() { echo "cluster.sh: $*" >&2; }

install() {
    command -v slurmctld slurmd munged >/dev/null && [ -e /usr/share/modules/init/bash ] && return
    [ "$(id -u)" = 0 ] || { say "install slurm-wlm, munge and environment-modules as root"; exit 2; }
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge \
        environment-modules >/dev/null
}

# cred_expire: a requeued job waits for twice the life of its credential, 121 s by default; below 5 is not taken.
# config_overrides: a node may claim more cores than the machine has.
write_conf() {
    local memory node
    memory=$(awk '/^MemTotal/ { print int($2 / 1024 * 0.9) }' /proc/meminfo)
    {
        cat <<END
ClusterName=skyrl
SlurmctldHost=$(hostname -s)($NET.1)
SlurmctldPort=$PORT
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$DIR/munge.sock,cred_expire=5
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool.%n
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmdPidFile=$DIR/slurmd.%n.pid
SlurmctldLogFile=$DIR/slurmctld.log
SlurmdLogFile=$DIR/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=10000,bf_interval=1,batch_sched_delay=0
ReturnToService=2
JobRequeue=1
KillWait=20
MinJobAge=600
FirstJobId=$((1 + 10000 * NUMBER))
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
END
        [ -z "${SLURM_TEST_PLUGSTACK:-}" ] || echo "PlugStackConfig=$SLURM_TEST_PLUGSTACK"
        [ "${#GPUS[@]}" = 0 ] || echo "GresTypes=gpu"
        for node in $(seq 0 $((NODES - 1))); do
            echo "NodeName=node$node ${GPUS[node]:+Gres=gpu:${GPUS[node]}} NodeHostname=node$node NodeAddr=$NET.1$node Port=$((PORT + 1))" \
                "CPUs=$CPUS Boards=1 SocketsPerBoard=1 CoresPerSocket=$CPUS ThreadsPerCore=1 RealMemory=$memory"
        done
        echo "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=30"
        echo "PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF"
    } >"$CONF"
    # Slurm counts files; what is in them, nobody asks.
    for node in "${!GPUS[@]}"; do
        [ "${GPUS[node]}" = 0 ] && continue
        touch $(seq -f "$DIR/gpu%.0f" 0 $((GPUS[node] - 1)))
        echo "NodeName=node$node Name=gpu File=$DIR/gpu[0-$((GPUS[node] - 1))]"
    done >"$DIR/gres.conf"
    printf 'CgroupAutomount=no\nConstrainCores=no\nConstrainRAMSpace=no\n' >"$DIR/cgroup.conf"
}

on() { # not `ip netns exec`, which hides /sys
    nsenter --net="/run/netns/$NAME$1" "${@:2}"
}

cut() { ip link set "${NAME}v$1" down; }

mend() { ip link set "${NAME}v$1" up; }

start() {
    local node try up
    [ "$(id -u)" = 0 ] || { say "nodes with networks of their own need root"; exit 2; }
    mkdir -p "$DIR/state" "$DIR/local"
    chmod 755 "$DIR"
    ip link add "${NAME}br" type bridge
    ip addr add "$NET.1/24" dev "${NAME}br"
    ip link set "${NAME}br" up
    for node in $(seq 0 $((NODES - 1))); do
        mkdir -p "$DIR/spool.node$node" "$DIR/disk.node$node"
        ip netns add "$NAME$node"
        ip link add "${NAME}v$node" type veth peer name eth0 netns "$NAME$node"
        ip link set "${NAME}v$node" master "${NAME}br" up
        on "$node" ip addr add "$NET.1$node/24" dev eth0
        on "$node" ip link set eth0 up
        on "$node" ip link set lo up
    done
    [ -s "$DIR/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom >"$DIR/munge.key")
    write_conf
    rm -f "$DIR/munge.sock"*
    munged --force --key-file="$DIR/munge.key" --socket="$DIR/munge.sock" --pid-file="$DIR/munged.pid" \
        --log-file="$DIR/munged.log" --seed-file="$DIR/munge.seed"
    slurmctld -i -f "$CONF"
    for node in $(seq 0 $((NODES - 1))); do
        on "$node" unshare --uts --mount bash -c "hostname node$node; mount --make-rprivate /
            mount --bind '$DIR/disk.node$node' '$DIR/local'; exec slurmd -N node$node -f '$CONF'"
    done
    export SLURM_CONF=$CONF
    for try in $(seq 120); do
        up=$(sinfo -h -N -p main -o '%t' 2>/dev/null | grep -c -E '^(idle|mix|alloc)$' || true)
        [ "$up" = "$NODES" ] && return
        sleep 0.25
    done
    say "$up of $NODES nodes came up; see the logs in $DIR"
    exit 1
}

stop() {
    local file node pid try pids=()
    [ -f "$CONF" ] && SLURM_CONF=$CONF timeout 10 scancel --full -u "$(id -un)" 2>/dev/null || true
    sleep 1
    for file in "$DIR"/slurmd.*.pid "$DIR/slurmctld.pid" "$DIR/munged.pid"; do
        [ -s "$file" ] || continue
        pid=$(cat "$file")
        # A pid file may outlive its daemon, and the number may belong to somebody else by now.
        case $(cat "/proc/$pid/comm" 2>/dev/null) in slurmd | slurmctld | munged) pids+=("$pid"); kill "$pid" ;; esac
    done
    for pid in "${pids[@]}"; do
        for try in $(seq 50); do
            kill -0 "$pid" 2>/dev/null || break
            sleep 0.2
        done
    done
    for node in $(seq 0 $((NODES - 1))); do
        ip netns del "$NAME$node" 2>/dev/null || true
        ip link del "${NAME}v$node" 2>/dev/null || true
    done
    ip link del "${NAME}br" 2>/dev/null || true
    [ -n "${SLURM_TEST_KEEP:-}" ] || rm -rf "$DIR"
}

case ${1:-} in
install | stop | cut | mend | on) "$@" ;;
start) install && start && echo "export SLURM_CONF=$CONF" ;;
run)
    shift
    install
    numbers=$(seq 0 $((${SLURM_TEST_CLUSTERS:-1} - 1)))
    trap 'for number in $numbers; do SLURM_TEST_NUMBER=$number "$0" stop; done' EXIT
    for number in $numbers; do SLURM_TEST_NUMBER=$number "$0" start >/dev/null; done
    SLURM_CONF=$CONF "$@"
    ;;
*)
    sed -n '2,16s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
