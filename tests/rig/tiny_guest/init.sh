#!/bin/sh
# First process of the rig's tiny guest. What it does is said on the kernel's command line: rig=TASK and rig_…=….
/bin/busybox mkdir -p /proc /sys /dev /run /tmp /mnt /var/run
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for module in $(cat /modules/order); do insmod "/modules/$module"; done
for word in $(cat /proc/cmdline); do
    case $word in rig=*|rig_*=*) eval "${word%%=*}='${word#*=}'" ;; esac
done
say() { echo "rig: $*"; }

# Disks appear when their controller has been asked.
for disk in $rig_disk $rig_second; do
    tries=0
    while [ ! -b "/dev/$disk" ] && [ $tries -lt 200 ]; do sleep 0.05; tries=$((tries + 1)); done
    [ -b "/dev/$disk" ] || say "no disk $disk"
done

if [ "$rig_agent" = 1 ]; then
    for port in /sys/class/virtio-ports/*; do
        if [ "$(cat "$port/name")" = org.qemu.guest_agent.0 ]; then
            qemu-ga -m virtio-serial -p "/dev/${port##*/}" -t /run >/tmp/qga.log 2>&1 &
            say agent started
        fi
    done
fi

case $rig in
    litmus)
        say ready
        litmus "/dev/$rig_disk" "/dev/$rig_second" "$rig_slots"
        say "litmus ended: $?" ;;
    files)
        mount -t ext4 "/dev/$rig_disk" /mnt || say "mount failed"
        say ready
        # A sum is written when its file is known to be on the disk, and removed before it: at every instant the files that
        # have a sum are whole.
        number=0
        while :; do
            number=$((number + 1))
            dd if=/dev/urandom of="/mnt/file.$number" bs=4k count=$((1 + number % 32)) 2>/dev/null && sync || { say "write failed"; break; }
            (cd /mnt && md5sum "file.$number" >"sum.$number") && sync || { say "write failed"; break; }
            old=$((number - 64))
            if [ $old -gt 0 ]; then
                rm "/mnt/sum.$old"; sync
                rm "/mnt/file.$old"; sync
            fi
            [ $((number % 16)) -eq 0 ] && say "files $number"
        done ;;
    check)
        if mount -t ext4 "/dev/$rig_disk" /mnt; then
            good=0 bad=0
            for sum in /mnt/sum.*; do
                [ -s "$sum" ] || continue
                if (cd /mnt && md5sum -cs "$sum"); then good=$((good + 1)); else bad=$((bad + 1)); fi
            done
            [ -e /mnt/marker ] && say "marker $(md5sum </mnt/marker)"
            say "checked $good good, $bad bad"
            umount /mnt
        else
            say "mount failed"
        fi
        poweroff -f ;;
    *)
        say ready ;;
esac
while :; do sleep 3600; done
