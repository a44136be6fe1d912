// The curves of a run: drawn by uPlot from the JSON that the fragment `series` carries, again whenever it changes.
// Colours are the style sheet's, so a chart follows the theme; what a chart says stands in words below it.
"use strict";

(() => {
  const holder = document.getElementById("series");
  if (!holder) return;
  const drawn = new Map();

  // A canvas knows no variables and no light-dark(): the browser works a colour out where it is some element's.
  const probe = document.body.appendChild(document.createElement("i"));
  probe.hidden = true;
  function css(name) {
    probe.style.color = `var(${name})`;
    return getComputedStyle(probe).color;
  }

  const percent = (value) => (value == null ? "–" : `${(100 * value).toFixed(1)} %`);
  const short = (value) => (value == null ? "–" : String(Number(value.toPrecision(4))));

  function size(bytes) {
    if (bytes == null) return "–";
    const units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let at = 0;
    while (bytes >= 1024 && at < units.length - 1) { bytes /= 1024; at += 1; }
    return `${at === 0 ? bytes : Number(bytes.toPrecision(3))} ${units[at]}`;
  }

  const binary = Array.from({ length: 52 }, (_, power) => 2 ** power);
  const faint = (name) => css(name).replace(/^rgb\((.*)\)$/, "rgba($1, 0.12)");

  function axis(extra) {
    const ink = css("--muted"), line = css("--line");
    return {
      stroke: ink, font: "12px system-ui, sans-serif", grid: { stroke: line, width: 1 },
      ticks: { stroke: line, width: 1, size: 4 }, ...extra,
    };
  }

  const rounds = () => axis({ incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000], size: 32 });
  const line = (label, colour, value, extra = {}) =>
    ({ label, stroke: css(colour), width: 2, spanGaps: true, points: { size: 5 }, value: (_, v) => value(v), ...extra });

  // A range that never has no height.
  const roomy = (low, high) => (_, min, max) => {
    if (min == null) return [low, high];
    const room = (max - min || Math.abs(max) || 1) * 0.08;
    return [Math.max(low, min - room), Math.min(high, max + room)];
  };

  // Logarithmic scales whose ends and lines are `steps`: some whole multiples of each power of `base`.
  function logarithmic(base, steps) {
    const below = (v) => [...around(v)].reverse().find((s) => s < v), above = (v) => around(v).find((s) => s > v);
    function around(value) {
      const at = Math.floor(Math.log(value) / Math.log(base));
      return [at - 1, at, at + 1].flatMap((power) => steps.map((step) => step * base ** power));
    }
    function splits(_, __, min, max) {
      const found = [];
      for (let at = min; at <= max * 1.001; at = above(at * 1.001)) found.push(at);
      const every = Math.ceil(found.length / 7);
      return found.filter((_, place) => place % every === 0);
    }
    return { scale: { distr: 3, range: (_, min, max) => (min == null ? [1, base] : [below(min), above(max)]) }, splits };
  }
  const decimal = logarithmic(10, [1, 2, 5]);

  // Points [round, norm, client, ratio, series] beside each other within their round, so that they do not hide each other.
  function beside(points) {
    const clients = [...new Set(points.map((p) => p[2]))].sort();
    const place = new Map(clients.map((client, at) => [client, (at + 0.5) / clients.length - 0.5]));
    return points.map((p) => [p[0] + 0.5 * place.get(p[2]), ...p.slice(1)]).sort((a, b) => a[0] - b[0]);
  }

  const kinds = {
    accuracy: (data) => ({
      data: [data.x, data.accuracy],
      series: [line("Accuracy", "--series-1", percent)],
      scale: { range: roomy(0, 1) },
      axis: { values: (_, ticks) => ticks.map((v) => `${Number((100 * v).toFixed(1))} %`), size: 56 },
    }),
    loss: (data) => ({
      data: [data.x, data.train_loss, data.loss],
      series: [line("Training", "--series-2", short), line("Held out", "--series-1", short, { dash: [6, 3] })],
      scale: { range: roomy(0, Infinity) },
      axis: { size: 48 },
    }),
    spent: (data) => ({
      data: [data.x, data.accuracy],
      series: [line("Accuracy", "--series-1", percent)],
      scale: { range: roomy(0, 1) },
      axis: { values: (_, ticks) => ticks.map((v) => `${Number((100 * v).toFixed(1))} %`), size: 56 },
      x: { label: "Sent", value: size, axis: { incrs: binary, values: (_, ticks) => ticks.map(size), space: 90, size: 32 } },
    }),
    // Up above the line and down below it: the two are almost alike, so beside each other one would hide the other.
    bytes: (data) => ({
      data: [data.x, data.up, data.down.map((v) => (v == null ? null : -v))],
      series: [
        line("Up", "--series-1", size, { fill: faint("--series-1"), fillTo: 0 }),
        line("Down", "--series-2", (v) => size(v == null ? v : -v), { dash: [6, 3], fill: faint("--series-2"), fillTo: 0 }),
      ],
      scale: { range: (_, min, max) => [Math.min(0, (min ?? -1) * 1.08), Math.max(0, (max ?? 1) * 1.08)] },
      axis: { incrs: binary, values: (_, ticks) => ticks.map((v) => size(Math.abs(v))), size: 76 },
    }),
    norms: (data) => {
      const all = beside([...data.usual.map((p) => [...p, 1]), ...data.apart.map((p) => [...p, 2])]);
      const dot = (size, colour, mark) => ({
        points: { show: true, size, fill: css(colour), stroke: css(colour) }, paths: () => null, mark,
      });
      return {
        data: [
          all.map((p) => p[0]), all.map((p) => (p[4] === 1 ? p[1] : null)), all.map((p) => (p[4] === 2 ? p[1] : null)),
        ],
        series: [
          line("Others", "--dots", short, dot(5, "--dots")),
          line(holder.dataset.client ? "This client" : "Outliers", "--bad", short, dot(9, "--bad")),
        ],
        scale: decimal.scale,
        axis: { splits: decimal.splits, filter: (_, ticks) => ticks, values: (_, ticks) => ticks.map(short), size: 52 },
        names: all.map((p) => p[2]),
      };
    },
  };

  // The legend shows the newest values while nobody points at the chart, and on a screen that cannot be pointed at.
  function rest(u) {
    const last = u.data.map((values) => {
      let at = values.length - 1;
      while (at > 0 && values[at] == null) at -= 1;
      return at;
    });
    last[0] = Math.max(...last.slice(1));
    u.setLegend({ idxs: last });
  }

  function options(box, kind, chart) {
    const series = [{ label: kind.x?.label ?? "Round", value: (u, v, _, at) => {
      if (v == null) return "–";
      if (kind.x) return kind.x.value(v);
      return chart.names && at != null ? `${Math.round(v)}, ${chart.names[at]}` : String(v);
    } }, ...kind.series];
    return {
      width: box.clientWidth, height: box.dataset.tall ? 300 : box.clientWidth < 420 ? 190 : 240,
      scales: { x: { time: false }, y: kind.scale },
      axes: [kind.x ? axis(kind.x.axis) : rounds(), axis(kind.axis)], series,
      cursor: { y: false, points: { size: 8 } }, legend: { live: true },
      hooks: { ready: [rest], setData: [rest], setCursor: [(u) => { if (u.cursor.idx == null) rest(u); }] },
    };
  }

  function draw(box, again) {
    const name = box.dataset.chart, value = all()[name];
    const points = value && (value.x ? value.x.length : value.usual.length + value.apart.length);
    box.parentElement.classList.toggle("empty", !points);
    const known = drawn.get(name);
    if (known && (again || !points)) {
      known.plot.destroy();
      drawn.delete(name);
    }
    if (!points || !box.clientWidth) return;
    const kind = kinds[name](value), chart = drawn.get(name) ?? {};
    chart.names = kind.names;
    if (chart.plot) {
      chart.plot.setData(kind.data);
    } else {
      chart.plot = new uPlot(options(box, kind, chart), kind.data, box);
      drawn.set(name, chart);
    }
  }

  const all = () => JSON.parse(holder.querySelector("[data-series]")?.dataset.series ?? "{}");
  let before = "";

  function update(again) {
    const now = holder.querySelector("[data-series]")?.dataset.series ?? "{}";
    if (!again && now === before) return;
    before = now;
    document.querySelectorAll("[data-chart]").forEach((box) => draw(box, again));
  }

  window.addEventListener("DOMContentLoaded", () => {
    update(true);
    window.fedpeft.onFragment((target) => { if (target.id === "series") update(false); });
    window.addEventListener("fedpeft-theme", () => update(true));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => update(true));
    let width = window.innerWidth;
    window.addEventListener("resize", () => {
      if (window.innerWidth !== width) { width = window.innerWidth; update(true); }
    });
  });
})();
