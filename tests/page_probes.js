// What tests of the page do inside of it, as functions by name.
({
  // Shows a text by the lengths in which it grows; and what is there then, also when it comes whole.
  rendered: async ([text, cuts]) => {
    const { render } = await import("/page/markdown.js");
    const here = document.querySelector("#messages"), box = document.createElement("div");
    box.className = "text";
    here.replaceChildren(box);
    for (const cut of cuts) render(box, text.slice(0, cut));
    const told = { shown: box.innerText, grown: box.innerHTML };
    // What marks said: numbers of lists, and where links lead.
    for (const item of box.querySelectorAll("li[value]")) item.prepend(item.value);
    for (const link of box.querySelectorAll("a"))
      if (!/^(https?:|mailto:)/i.test(link.textContent)) link.append(link.title);
    told.all = box.textContent;
    box.replaceChildren();
    render(box, text);
    told.whole = box.innerHTML;
    told.tags = [...new Set([...box.querySelectorAll("*")].map((each) => each.localName))];
    const attributes = [...box.querySelectorAll("*")].flatMap((each) => [...each.attributes]);
    told.names = [...new Set(attributes.map(({ name }) => name))];
    told.links = [...box.querySelectorAll("a")].map((each) => each.href);
    return told;
  },

  // The words of each line with their style, of lines that are paragraphs.
  styled: async (lines) => {
    const { render } = await import("/page/markdown.js");
    const box = document.createElement("div");
    return lines.map((line) => {
      box.replaceChildren();
      render(box, line);
      const texts = document.createTreeWalker(box, NodeFilter.SHOW_TEXT);
      const told = [];
      for (let node; (node = texts.nextNode()); ) {
        const has = (tag) => Boolean(node.parentElement.closest(tag));
        const style = [has("strong") && "bold", has("em") && "italic", has("code") && "code"];
        told.push([style.filter(Boolean).join(" "), node.textContent]);
      }
      return told;
    });
  },

  // The contrast of each visible text, placeholder and icon, as WCAG 2 defines it; with the text.
  contrast: () => {
    const channel = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
    const parsed = (colour) => colour.match(/[\d.]+/g).map(Number);
    const ground = (element) => {
      for (; element; element = element.parentElement) {
        const [r, g, b, a = 1] = parsed(getComputedStyle(element).backgroundColor);
        if (a === 1) return [r, g, b];
      }
      return [255, 255, 255];
    };
    const told = [];
    const take = (element, colour, text) => {
      const [a, b] = [light(parsed(colour)), light(ground(element))].sort((x, y) => y - x);
      told.push([(a + 0.05) / (b + 0.05), text.trim().slice(0, 40)]);
    };
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let node; (node = texts.nextNode()); ) {
      const element = node.parentElement;
      if (node.textContent.trim() && element.checkVisibility({ visibilityProperty: true }))
        take(element, getComputedStyle(element).color, node.textContent);
    }
    for (const field of document.querySelectorAll("input, textarea"))
      if (field.checkVisibility()) take(field, getComputedStyle(field, "::placeholder").color, field.placeholder);
    for (const icon of document.querySelectorAll("svg"))
      if (icon.checkVisibility()) take(icon, getComputedStyle(icon).color, "icon");
    return told;
  },

  // What is wider than a phone, and would scroll sideways.
  tooWide: () => {
    const parts = "html, body, main, header, footer, #scroll, article, .text, .text > p";
    const isWide = (part) => part.scrollWidth > part.clientWidth || part.getBoundingClientRect().right > innerWidth;
    return [...document.querySelectorAll(parts)].filter(isWide).map((part) => `${part.localName}.${part.className}`);
  },

  // The name of what has the focus, and how that is seen.
  focused: () => {
    const element = document.activeElement;
    const name = element === document.body ? "" : element.ariaLabel ?? element.textContent;
    return [name, getComputedStyle(element).outlineStyle];
  },

  // What the page's policy refuses of what a script might try.
  refused: async () => {
    const told = [];
    addEventListener("securitypolicyviolation", ({ effectiveDirective }) => told.push(effectiveDirective));
    const tries = {
      script: () => (document.createElement("script").src = "https://evil.example/x.js"),
      html: () => (document.body.innerHTML += "<b>x</b>"),
      image: () => {
        const image = new Image();
        image.src = "https://evil.example/x.png";
        document.body.append(image);
      },
      style: () => {
        const style = document.createElement("style");
        style.textContent = "* { color: red }";
        document.body.append(style);
      },
      ask: () => fetch("https://evil.example/"),
    };
    for (const [name, attempt] of Object.entries(tries)) {
      try {
        await attempt();
      } catch {
        told.push(name);
      }
    }
    await new Promise((done) => setTimeout(done, 100));
    return told;
  },

  // Which of these routes a page can read, asking in each way that there is; and whether a frame.
  readable: async ([url, routes, key, isFramed]) => {
    const json = { "content-type": "application/json" }, shown = { authorization: `Bearer ${key}` };
    const ways = [
      {}, { headers: json }, { headers: { ...json, ...shown } }, { headers: { "x-api-key": key } },
      { mode: "no-cors" }, { mode: "no-cors", headers: { "content-type": "text/plain" } },
      { credentials: "include" },
    ];
    const asked = routes.flatMap(([method, path]) => ways.map(async (way) => {
      const body = method === "POST" ? "{}" : undefined;
      try {
        const response = await fetch(url + path, { method, body, ...way });
        const text = await response.text();
        return text || response.status || [...response.headers].length ? [method, path] : null;
      } catch { return null }
    }));
    const framed = isFramed && await new Promise((done) => {
      const frame = document.createElement("iframe");
      frame.onload = () => done(frame.contentDocument !== null && frame.contentDocument.body.innerText);
      frame.src = url;
      document.body.append(frame);
    });
    return [(await Promise.all(asked)).filter(Boolean), framed];
  },
})
