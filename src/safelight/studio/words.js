// The model, and what a prompt means to it: tokens, choosers of LoRAs, embeddings and styles.
{
  const {make, ask} = safelight;
  const field = id => document.querySelector(`#${id} textarea, #${id} input`);

  // Gradio listens for events; a value that is set by a script raises none.
  const set = (box, value) => {
    box.value = value;
    box.dispatchEvent(new Event("input", {bubbles: true}));
  };

  const syntax = () => field("prompt_syntax")?.value || "plain";  // folded away, it is as at first
  const lines = id => (field(id)?.value || "").split("\n").map(one => one.trim()).filter(Boolean);

  // --- tokens, counted as one types -------------------------------------------------------------

  const PAUSE = 350;  // milliseconds without a key

  const counted = (name, read) => {
    let tokens = 0, chunks = 0, room = 0;
    for (const part of read.parts) for (const stage of part.stages) {
      const all = stage.texts.flatMap(text => text.chunks);
      const sum = all.reduce((n, chunk) => n + chunk.count, 0);
      if (sum >= tokens) [tokens, chunks, room] = [sum, all.length, all[0]?.room || 0];
    }
    const of = chunks > 1 ? `in ${chunks} chunks of ${room}` : `of ${room}`;
    return `${name}: ${tokens} ${chunks > 1 ? `tokens ${of}` : `${of} tokens`}`;
  };

  let model = "";  // the name of the chosen one
  let last = "", waiting = 0;
  const count = () => {
    const line = document.querySelector("#count .count");
    const [prompt, negative] = [field("prompt"), field("negative")];
    if (!line || !prompt || !negative) return;
    const asked = {prompt: prompt.value, negative_prompt: negative.value, prompt_syntax: syntax(),
                   embeddings: lines("embeddings"), ...(model && {model})};
    const now = JSON.stringify(asked);
    if (now === last) return;
    last = now;
    clearTimeout(waiting);
    if (!asked.prompt && !asked.negative_prompt) { line.replaceChildren(); return; }
    waiting = setTimeout(async () => {
      let told, problem = "";
      try {
        const read = await ask("/api/tokens", {
          method: "POST", headers: {"content-type": "application/json"}, body: now,
        });
        told = [counted("Prompt", read.prompt)];
        if (asked.negative_prompt) told.push(counted("negative", read.negative_prompt));
        problem = [...read.prompt.warnings, ...read.negative_prompt.warnings]
          .map(one => one.replace(/^cut at \d+ tokens; /, ""))  // with the marks around a prompt
          .join("; ");
      } catch (error) { [told, problem] = [[], error.message]; }
      if (now !== last) return;  // more was typed meanwhile
      line.replaceChildren(told.join(" · "));
      if (problem) line.append(make("span", {className: "said", textContent: problem}));
    }, PAUSE);
  };

  // --- choosers ---------------------------------------------------------------------------------

  // A list of choices that act when they are chosen.
  const menu = (label, names, chosen) => {
    const select = make("select", {"ariaLabel": label},
      make("option", {value: "", textContent: `${label} …`}),
      ...names.map(name => make("option", {value: name, textContent: name})));
    select.onchange = () => { chosen(select.value); select.value = ""; };
    return select;
  };

  const weighed = line => {  // "ink:0.8:0.4" is ink at 0.8, in the text encoder at 0.4
    const [, name, weight, text] = line.match(/^(.*?)(?::([+-]?[\d.]+))?(?::([+-]?[\d.]+))?$/);
    return [name, weight === undefined ? 1 : Number(weight), text === undefined ? "" : `:${text}`];
  };

  // The lines of a box as rows, each with a slider if it has a weight, and a button to remove it.
  const rows = (box, list, weights) => {
    const shown = box.value;
    if (list.dataset.shown === shown) return;
    list.dataset.shown = shown;
    const there = shown.split("\n").map(one => one.trim()).filter(Boolean);
    list.replaceChildren(...there.map((line, place) => {
      const replace = (...by) => {
        const next = [...there];
        next.splice(place, 1, ...by);
        return next.join("\n");
      };
      const [name, weight, text] = weights ? weighed(line) : [line, 1, ""];
      const row = make("li", {}, make("span", {textContent: name}));
      if (weights) {
        const told = make("output", {textContent: weight});
        const slider = make("input", {type: "range", min: -1, max: 2, step: 0.05, value: weight,
                                      ariaLabel: `Weight of ${name}`});
        slider.oninput = () => {
          told.textContent = slider.value;
          there[place] = `${name}:${slider.value}${text}`;
          list.dataset.shown = there.join("\n");  // the focus stays on the slider
          set(box, list.dataset.shown);
        };
        row.append(slider, told);
      }
      row.append(make("button", {type: "button", textContent: "Remove", ariaLabel: `Remove ${name}`,
                                 onclick: () => set(box, replace())}));
      return row;
    }));
  };

  const add = (box, line) => {
    const name = weighed(line)[0];
    const there = box.value.split("\n").filter(Boolean);
    if (!there.some(one => weighed(one)[0] === name)) set(box, [...there, line].join("\n"));
  };

  const insert = text => {
    const box = field("prompt"), at = box.selectionStart ?? box.value.length;
    const [before, after] = [box.value.slice(0, at), box.value.slice(box.selectionEnd ?? at)];
    const gap = before && !/\s$/.test(before) ? " " : "";
    set(box, `${before}${gap}${text}${after && !/^[\s,]/.test(after) ? " " : ""}${after}`);
  };

  const known = {};  // what there is for each model; asked once, and again when the page is reloaded
  const library = () => known[model] ??= ask(`/api/library?${new URLSearchParams(model && {model})}`)
    .catch(() => ({loras: [], embeddings: [], styles: []}));

  const NOTHING = "none here: start the server with --models-dir to choose from a folder";

  const dress = async (id, what) => {
    const box = field(id);
    if (!box || box.dataset.dressed === `for ${model}`) return;
    const mine = box.dataset.dressed = `for ${model}`;
    const there = await library();
    if (box.dataset.dressed !== mine) return;  // another model was chosen meanwhile
    box.closest(`#${id}`).querySelector(".chooser")?.remove();
    const chooser = make("div", {className: "chooser"});
    if (what === "embeddings") {
      const usable = there.embeddings.filter(one => !one.problem).map(one => one.name);
      if (usable.length) chooser.append(menu("Insert an embedding", usable, name => {
        if (!name) return;
        insert(syntax() === "comfy" ? `embedding:${name}` : name);
        if (["plain", "compel"].includes(syntax())) add(box, name);  // the others find it by itself
      }));
      for (const one of there.embeddings.filter(one => one.problem)) {
        chooser.append(make("p", {textContent: one.problem}));
      }
    } else if (there[what].length) {
      const one = what === "loras" ? "Add a LoRA" : "Add a style";
      chooser.append(menu(one, there[what], name => name && add(box, name)));
    }
    if (!chooser.childElementCount) {
      const why = what === "styles" ? "none here: start the server with --styles-file" : NOTHING;
      chooser.append(make("p", {textContent: why}));
    }
    const list = make("ul");
    chooser.append(list);
    box.closest(`#${id}`).append(chooser);
    if (what !== "embeddings") box.watched = () => rows(box, list, what === "loras");
  };

  // --- the model --------------------------------------------------------------------------------

  // A list of the models that the server may draw with, and what is known of the chosen one.
  safelight.model = (element, {trigger, watch, props}) => {
    const select = make("select", {ariaLabel: "Model"});
    const facts = make("span", {className: "facts"});
    element.querySelector(".model").replaceChildren(make("label", {}, "Model ", select), facts);
    let models = [];

    const show = () => {
      const names = models.map(one => one.name);
      if (!names.includes(model)) names.unshift(model);
      if (select.dataset.shown !== JSON.stringify(names)) {  // an open list stays open
        select.dataset.shown = JSON.stringify(names);
        select.replaceChildren(...names.map(name => make("option", {value: name, textContent: name})));
      }
      select.value = model;
      const one = models.find(one => one.name === model) || {};
      const known = [one.family, one.width && `${one.width}×${one.height}`, one.dtype,
                     one.vae && `VAE ${one.vae}`, one.loaded === false && "not loaded yet"];
      facts.textContent = known.filter(Boolean).join(", ");
    };

    let timer = 0;
    const look = async () => {
      clearTimeout(timer);
      try { models = await ask("/api/models"); } catch { /* the live view says it */ }
      show();
      if (!models.find(one => one.name === model)?.loaded) timer = setTimeout(look, 4000);
    };

    select.onfocus = look;  // new files may lie in the models folder
    select.onchange = () => {
      model = props.value = select.value;
      trigger("choose");
      show();
      look();
    };
    watch("value", () => { model = props.value; show(); look(); });
    model = props.value;
    show();
    look();
  };

  setInterval(() => {
    if (document.hidden || !model) return;
    count();
    for (const id of ["loras", "embeddings", "styles"]) {
      dress(id, id);
      field(id)?.watched?.();
    }
  }, 300);
}
