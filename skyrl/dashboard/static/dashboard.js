// Charts (uPlot), what is live, and keys. Pages work without it, but for the charts. No library but uPlot.
"use strict";
(() => {
  const $$ = (where, what) => [...where.querySelectorAll(what)];
  const tools = document.querySelector("#chart-tools");
  const charts = new Map(); // figure -> Chart
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const colour = (i) => css(`--c${i % 10}`);
  const faint = (hex) => hex + "26";

  function short(v) {
    if (v == null) return "–";
    const a = Math.abs(v);
    if (a !== 0 && (a < 1e-3 || a >= 1e7)) return v.toExponential(2);
    if (Number.isInteger(v)) return v.toLocaleString("en");
    return Number(v.toPrecision(4)).toLocaleString("en", { maximumFractionDigits: 6 });
  }

  // A number beside an axis, where there is little room.
  function tick(v) {
    const a = Math.abs(v);
    if (a !== 0 && a < 1e-3) return v.toExponential(2).replace(/\.?0*e/, "e");
    const unit = [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]].find(([from]) => a >= from);
    return unit ? Number((v / (unit[1] === "k" ? 1e3 : unit[0])).toPrecision(4)) + unit[1] : short(v);
  }

  // The axis of values that are all equal.
  const around = (v) => (v === 0 ? [0, 1] : v > 0 ? [0, 1.25 * v] : [1.25 * v, 0]);

  // Exponential average that begins with the first value: what TensorBoard calls smoothing.
  function smoothed(ys, part) {
    if (!part) return ys;
    let sum = 0, weight = 0;
    return ys.map((y) => {
      if (y == null) return y;
      sum = part * sum + (1 - part) * y;
      weight = part * weight + (1 - part);
      return sum / weight;
    });
  }

  class Chart {
    constructor(figure) {
      this.figure = figure;
      this.plotBox = figure.querySelector(".plot");
      this.legend = figure.querySelector(".legend");
      this.readout = figure.querySelector(".readout");
      this.name = figure.querySelector("h3").textContent;
      this.off = new Set(); // labels that are not drawn
      this.plot = null;
      this.answer = null;
      this.range = null; // [from, to] when zoomed
      this.loading = false;
      this.plotBox.addEventListener("keydown", (event) => this.key(event));
    }

    async load() {
      if (this.loading) { this.again = true; return; }
      this.loading = true;
      try {
        const url = new URL(this.figure.dataset.src, location.href);
        if (tools && tools.axis) url.searchParams.set("axis", tools.axis.value);
        if (this.range) { url.searchParams.set("least", this.range[0]); url.searchParams.set("most", this.range[1]); }
        const reply = await fetch(url, { headers: { accept: "application/json" } });
        if (!reply.ok) throw new Error(reply.status === 401 ? "log in again" : (await reply.json()).detail);
        this.answer = await reply.json();
        this.draw();
      } catch (error) {
        this.readout.textContent = `The numbers could not be had: ${error.message}.`;
      }
      this.loading = false;
      if (this.again) { this.again = false; this.load(); }
    }

    draw() {
      const part = tools ? Number(tools.smooth.value) : 0;
      const log = tools ? tools.log.checked : false;
      const tables = [], series = [{ label: this.answer.axis }], bands = [];
      this.lines = [];
      this.answer.series.forEach((one, i) => {
        const ink = colour(i), shown = !this.off.has(one.label);
        const ys = log ? one.y.map((y) => (y > 0 ? y : null)) : one.y;
        const table = [one.x, smoothed(ys, part)];
        const at = series.length;
        const few = one.x.length < 40;
        series.push({ label: one.label, stroke: ink, width: 1.6, show: shown, spanGaps: true, points: { show: few, size: 5 } });
        this.lines.push({ label: one.label, at, ink, count: one.x.length });
        if (one.lo && !part) {
          const fit = (ys) => (log ? ys.map((y) => (y > 0 ? y : null)) : ys);
          table.push(fit(one.hi), fit(one.lo));
          for (let k = 0; k < 2; k++) series.push({ stroke: "transparent", show: shown, spanGaps: true, points: { show: false }, isBand: at });
          bands.push({ series: [at + 1, at + 2], fill: faint(ink) });
        }
        tables.push(table);
      });
      this.drawLegend();
      if (this.plot) this.plot.destroy();
      this.plot = null;
      this.plotBox.replaceChildren();
      const data = tables.length ? uPlot.join(tables) : [[]];
      if (!data[0].length) {
        this.readout.textContent = "Nothing to draw yet.";
        return;
      }
      this.readout.textContent = "";
      const axis = { stroke: css("--soft"), grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line"), width: 1 }, font: "12px system-ui" };
      const wide = this.figure.parentElement.classList.contains("wide");
      this.plot = new uPlot({
        width: this.plotBox.clientWidth || 360,
        height: wide ? 420 : 210,
        series, bands,
        legend: { show: false },
        scales: { x: { time: false }, y: log ? { distr: 3 } : { range: (u, low, high) => (low == null ? [0, 1] : low === high ? around(low) : uPlot.rangeNum(low, high, 0.08, true)) } },
        axes: [
          { ...axis, values: (u, vs) => vs.map((v) => (Math.abs(v) < 1e7 ? short(v) : tick(v))) },
          { ...axis, size: 62, values: (u, vs) => vs.map((v) => (v == null ? "" : tick(v))) },
        ],
        cursor: { drag: { x: true, y: false }, sync: { key: "all", setSeries: false }, points: { size: 7 } },
        hooks: {
          setCursor: [(u) => this.read(u.cursor.idx)],
          setSelect: [(u) => { if (u.select.width > 4) this.zoom(u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")); }],
        },
      }, data, this.plotBox);
      this.plot.over.addEventListener("dblclick", () => this.zoom());
    }

    zoom(from, to) {
      this.range = from == null ? null : [from, to];
      this.load();
    }

    read(index) {
      if (index == null || !this.plot) return;
      const x = this.plot.data[0][index];
      const said = [];
      for (const line of this.lines) {
        if (!this.plot.series[line.at].show) continue;
        const ys = this.plot.data[line.at];
        let i = index; // lines that have no value here show their last one
        while (i > 0 && ys[i] == null) i--;
        said.push(this.lines.length > 1 ? `${line.label} ${short(ys[i])}` : short(ys[i]));
        if (said.length > 8) { said.push("…"); break; }
      }
      this.readout.textContent = `${this.answer.axis} ${short(x)}: ${said.join(", ")}`;
    }

    drawLegend() {
      if (this.lines.length < 2) { this.legend.replaceChildren(); return; }
      this.legend.replaceChildren(...this.lines.slice(0, 200).map((line) => {
        const button = document.createElement("button"), swatch = document.createElement("i");
        button.type = "button";
        swatch.style.background = line.ink; // by the object model, which the content policy allows
        button.setAttribute("aria-pressed", String(!this.off.has(line.label)));
        button.append(swatch, line.label);
        button.addEventListener("click", (event) => {
          const labels = this.lines.map((one) => one.label);
          if (event.shiftKey) this.off = new Set(labels.filter((one) => one !== line.label));
          else if (!this.off.delete(line.label)) this.off.add(line.label);
          this.draw();
        });
        return button;
      }));
    }

    key(event) {
      if (!this.plot || event.ctrlKey || event.metaKey || event.altKey) return;
      const xs = this.plot.data[0], u = this.plot;
      const at = u.cursor.idx ?? xs.length - 1;
      const step = event.shiftKey ? Math.max(1, Math.round(xs.length / 20)) : 1;
      const go = { ArrowLeft: at - step, ArrowRight: at + step, Home: 0, End: xs.length - 1 }[event.key];
      if (go !== undefined) {
        const i = Math.min(xs.length - 1, Math.max(0, go));
        u.setCursor({ left: u.valToPos(xs[i], "x"), top: 10 });
      } else if (event.key === "+") {
        const middle = xs[at], half = (xs[xs.length - 1] - xs[0]) / 4;
        this.zoom(middle - half, middle + half);
      } else if (event.key === "0" || event.key === "-") {
        this.zoom();
      } else return;
      event.preventDefault();
    }
  }

  // A chart is loaded when it comes into sight, and again when the run has changed and it is in sight.
  const inSight = new Set();
  const watcher = new IntersectionObserver((seen) => {
    for (const one of seen) {
      if (!one.isIntersecting) { inSight.delete(one.target); continue; }
      inSight.add(one.target);
      const chart = charts.get(one.target);
      if (!chart.answer || chart.stale) { chart.stale = false; chart.load(); }
    }
  }, { rootMargin: "200px" });
  for (const figure of $$(document, ".chart")) {
    charts.set(figure, new Chart(figure));
    watcher.observe(figure);
  }
  const redraw = () => charts.forEach((chart) => chart.answer && chart.draw());
  const reload = () => charts.forEach((chart, figure) => (inSight.has(figure) ? chart.load() : (chart.stale = true)));
  let resizing = 0;
  addEventListener("resize", () => {
    clearTimeout(resizing);
    resizing = setTimeout(() => charts.forEach((chart) => chart.plot && chart.plot.setSize({ width: chart.plotBox.clientWidth, height: chart.plot.height })), 150);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  if (tools) {
    tools.addEventListener("submit", (event) => event.preventDefault());
    tools.addEventListener("input", (event) => (event.target.name === "axis" ? (charts.forEach((one) => (one.range = null)), reload()) : redraw()));
  }

  // ---- live parts: what has data-live is taken from the page as it is now; a fragment from a page of its own

  async function fetched(url) {
    const reply = await fetch(url, { headers: { accept: "text/html" } });
    return reply.ok && !reply.redirected ? new DOMParser().parseFromString(await reply.text(), "text/html") : null;
  }

  async function refreshParts() {
    const parts = $$(document, "[data-live]");
    const page = parts.length ? await fetched(location.href) : null;
    for (const part of page ? parts : []) {
      const now = page.getElementById(part.id);
      if (!now || now.innerHTML === part.dataset.was) continue;
      const ticked = new Set($$(part, "input:checked").map((box) => box.value));
      const focused = part.contains(document.activeElement) ? document.activeElement : null;
      const where = focused && [focused.tagName, focused.getAttribute("href"), focused.value];
      part.dataset.was = now.innerHTML;
      part.replaceChildren(...now.childNodes);
      for (const box of $$(part, "input[type=checkbox]")) box.checked = ticked.has(box.value);
      if (where) $$(part, where[0]).find((one) => one.getAttribute("href") === where[1] && one.value === where[2])?.focus();
    }
    for (const place of $$(document, "[data-fragment]")) {
      const told = (await fetched(place.dataset.fragment))?.querySelector("[data-part]");
      if (told) place.replaceChildren(...told.childNodes);
    }
  }

  const live = document.querySelector("#live");
  let stream = null, due = 0, last = 0;
  function changed() {
    if (due) return;
    due = setTimeout(async () => {
      due = 0;
      last = Date.now();
      reload();
      await refreshParts().catch(() => {});
    }, Math.max(0, 2000 - (Date.now() - last)));
  }
  function listen() {
    if (stream || !document.body.dataset.events || document.hidden) return;
    stream = new EventSource(document.body.dataset.events);
    stream.addEventListener("open", () => (live.textContent = "live"));
    stream.addEventListener("changed", changed);
    stream.addEventListener("error", () => (live.textContent = "not connected; trying again"));
  }
  // A browser opens few connections to one host: a tab that nobody sees must not hold one.
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) { listen(); changed(); return; }
    stream?.close();
    stream = null;
  });
  addEventListener("pagehide", () => { stream?.close(); stream = null; });
  addEventListener("pageshow", (event) => event.persisted && listen());
  listen();
  if ($$(document, "[data-fragment]").length) refreshParts().catch(() => {});

  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest("input, select, textarea");
    if (event.key === "/" && !typing) {
      document.querySelector("[data-search]")?.focus();
      event.preventDefault();
    } else if (event.key === "Escape") {
      $$(document, "details.why[open]").forEach((one) => (one.open = false));
    } else if ((event.key === "j" || event.key === "k") && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
      const link = document.querySelector(event.key === "j" ? "a[rel=next]" : "a[rel=prev]");
      if (link) link.click();
    }
  });
})();
