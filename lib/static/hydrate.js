/* Brings <div class="book-vega"> to life: own controls, one self-hosted Vega bundle, theme colours, phones, print.
   Written by lib/intruder/charts.py; loaded by lib/book_ext.py. No network: the bundle lies beside this file. */
(() => {
  const bundleURL = new URL("vega-bundle.js", document.currentScript.src).href;   // any folder depth, also file://
  const NARROW = 560;
  let bundle;

  function load() {
    return bundle ??= new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = bundleURL;
      script.onload = resolve;
      script.onerror = () => reject(new Error("the file vega-bundle.js is missing"));
      document.head.append(script);
    });
  }

  function themed() {
    const style = getComputedStyle(document.documentElement);
    const read = (name, otherwise) => style.getPropertyValue(name).trim() || otherwise;
    const text = read("--pst-color-text-base", "#222"), line = read("--pst-color-border", "#888");
    return {
      background: "transparent", font: "inherit", text: { color: text }, title: { color: text },
      style: { "guide-label": { fill: text, fontSize: 11 }, "guide-title": { fill: text, fontWeight: "normal" }, cell: { stroke: line } },
      axis: { gridColor: line, gridOpacity: 0.5, domainColor: line, tickColor: line },
      header: { labelColor: text, labelFontSize: 12 }, legend: { labelColor: text, titleColor: text },
    };
  }

  /* Controls of our own instead of Vega's: they keep their values when the chart is drawn anew, and speak. */
  function control(host, param, labels) {
    const id = `${host.id}-${param.name}`, bind = param.bind, row = document.createElement("div");
    const name = Object.assign(document.createElement("label"), { htmlFor: id, textContent: bind.name || param.name });
    const select = bind.input === "select";
    const input = document.createElement(select ? "select" : "input");
    Object.assign(input, { id, name: param.name });
    const shown = document.createElement("output");
    shown.htmlFor = id;
    if (select) {
      bind.options.forEach(option => input.add(new Option(option, option)));
    } else {
      Object.assign(input, { type: "range", min: bind.min, max: bind.max, step: bind.step });
    }
    input.value = param.value;
    const decimals = (String(bind.step || 1).split(".")[1] || "").length;
    const speak = () => {
      if (select) return;
      const text = labels ? labels[+input.value - bind.min] : Number(input.value).toFixed(decimals);
      shown.textContent = text;
      input.setAttribute("aria-valuetext", text);
    };
    const value = () => select ? input.value : +input.value;
    input.addEventListener("input", () => { speak(); update(host, param.name, value()); });
    speak();
    row.className = "book-control";
    row.append(name, input, ...(select ? [] : [shown]));
    row.hidden = select && bind.options.length < 2;
    host.querySelector(".book-controls").append(row);
    host.values[param.name] = value;
  }

  function update(host, name, value) {
    if (!host.view) return;
    host.view.signal(name, value);
    if (host.waiting) return;                                   // one redraw per frame, however fast the slider moves
    host.waiting = requestAnimationFrame(async () => {
      host.waiting = 0;
      await host.view.runAsync();
      readout(host);
    });
  }

  /* The sentence that the chart computes as the description of an invisible mark, put where everyone can read it. */
  function readout(host) {
    const mark = host.querySelector("[class*='readout'] path");
    const out = host.querySelector(".book-readout");
    out.hidden = !host.hasReadout;
    out.textContent = mark ? mark.getAttribute("aria-label") : "No run of this method is recorded here.";
    host.dataset.draws = +(host.dataset.draws || 0) + 1;
  }

  function fit(spec, width) {
    if (width >= NARROW) return spec;
    const plot = Math.max(180, width - 70), tight = Math.max(160, width - 100);
    if (spec.hconcat) {
      spec.vconcat = spec.hconcat;
      delete spec.hconcat;
      spec.vconcat[0].width = tight;
      spec.vconcat[1].width = Math.max(60, width - 195);        // room for the method's name and its number
      spec.usermeta.numbersAt = spec.vconcat[1].width + 8;
    }
    if (spec.facet) {
      spec.columns = 1;
      spec.spec.width = plot;
      for (const part of [spec.spec, ...(spec.spec.layer || [])]) {
        for (const channel of Object.values(part.encoding || {})) {
          if (channel.legend) channel.legend.columns = 2;
        }
      }
    }
    return spec;
  }

  async function embed(host) {
    const spec = fit(JSON.parse(host.querySelector("script").textContent), host.clientWidth);
    host.narrow = host.clientWidth < NARROW;
    host.hasReadout = JSON.stringify(spec.hconcat || spec.vconcat || "").includes('"name":"readout');
    for (const param of spec.params || []) {
      delete param.bind;
      if (host.values[param.name]) param.value = host.values[param.name]();
      if (param.name === "numbers_at" && spec.usermeta.numbersAt) param.value = spec.usermeta.numbersAt;
    }
    host.finalize?.();
    const made = await window.vegaEmbed(host.querySelector(".book-vega-target"), spec, {
      mode: "vega-lite", renderer: "svg", config: themed(), tooltip: { theme: "custom" },
      actions: !host.narrow && { export: true, source: false, compiled: false, editor: false },
    });
    Object.assign(host, { view: made.view, finalize: made.finalize });
    readout(host);
    host.dataset.ready = "1";
  }

  async function start(host) {
    if (host.started) return;
    host.started = true;
    try {
      await load();
      await embed(host);
    } catch (error) {
      const note = Object.assign(document.createElement("p"), { className: "book-vega-error", textContent: `The figure failed: ${error.message}` });
      host.append(note);
      console.error(error);
    }
  }

  function prepare(host, number) {
    host.id ||= `book-figure-${number}`;
    host.values = {};
    const spec = JSON.parse(host.querySelector("script").textContent);
    const labels = (spec.usermeta || {}).slider || {};
    (spec.params || []).filter(param => param.bind && param.bind.input).forEach(param => control(host, param, labels[param.name]));
  }

  function begin() {
    const hosts = [...document.querySelectorAll(".book-vega")];
    if (!hosts.length) return;
    hosts.forEach(prepare);
    const seen = new IntersectionObserver(entries => entries.forEach(entry => {
      if (entry.isIntersecting) { seen.unobserve(entry.target); start(entry.target); }
    }), { rootMargin: "600px" });
    hosts.forEach(host => seen.observe(host));
    const redraw = () => hosts.filter(host => host.view).forEach(embed);
    new MutationObserver(redraw).observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
    let resizing;
    addEventListener("resize", () => {
      clearTimeout(resizing);
      resizing = setTimeout(() => hosts.filter(host => host.view && (host.narrow || host.clientWidth < NARROW)).forEach(embed), 200);
    });
    addEventListener("beforeprint", () => hosts.forEach(start));
  }

  document.readyState === "loading" ? addEventListener("DOMContentLoaded", begin) : begin();
})();
